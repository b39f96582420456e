// What an access of a warp to shared memory costs.
#pragma once
#include <algorithm>
#include <vector>
#include "instruction.h"

// Of 32 banks each gives one word a wavefront. Accesses wider than a word go in parts of 128 bytes.
inline u64 wavefronts(const u64 (&addresses)[LANES], u32 lanes, int size) {
    const int part = size <= 4 ? LANES : 128 / size, words = (size + 3) / 4;
    u64 found = 0;
    for (int first = 0; first < LANES; first += part) {
        std::vector<u64> seen;
        for (int lane = first; lane < first + part; lane++)
            for (int word = 0; lanes >> lane & 1 && word < words; word++)
                seen.push_back(addresses[lane] / 4 + word);
        std::sort(seen.begin(), seen.end());
        seen.erase(std::unique(seen.begin(), seen.end()), seen.end());
        u64 of_bank[32] = {};
        for (const u64 word : seen) of_bank[word % 32]++;
        found += *std::max_element(of_bank, of_bank + 32);
    }
    return found;
}
