// Shared memory of a block, word by word with its history.
#pragma once
#include <random>
#include <vector>
#include "access_history.h"
#include "report.h"

constexpr u32 SHARED_BASE = 1024;  // where dynamic shared memory begins; as on sm_80, not at 0

class SharedMemory {
   public:
    SharedMemory(u32 size, std::mt19937_64& random, Report& report)
        : size(size), bytes(size + 16), words((size + 3) / 4), report(report) {
        for (u8& byte : bytes) byte = random();  // what the block before left
    }

    // was_written: did somebody write all of it?
    u8* touch(Access access, const Warp& warp, int lane, u32 address, u32 length, u32 pc, bool& was_written) {
        const u32 offset = address - SHARED_BASE;
        if (offset >= size || length > size - offset) throw Fault{"shared access out of bounds", pc};
        if (address % length) throw Fault{"misaligned shared access", pc};
        was_written = true;
        for (u32 word = offset / 4; word <= (offset + length - 1) / 4; word++) {
            was_written &= words[word].was_written();
            if (const char* race = words[word].touch(access, warp, lane)) report.note(race, pc);
        }
        return bytes.data() + (16 - u64(bytes.data()) % 16) % 16 + offset;
    }

   private:
    const u32 size;
    std::vector<u8> bytes;
    std::vector<AccessHistory> words;
    Report& report;
};
