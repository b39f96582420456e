// What is held against a kernel: faults that end the launch, and others that are noted and counted.
#pragma once
#include <map>
#include <string>
#include <utility>
#include "numbers.h"

struct Fault {
    const char* words;
    u32 pc;
};

struct Report {
    std::map<std::pair<u32, std::string>, u64> noted;  // instruction and words: how often

    void note(const char* words, u32 pc) { noted[{pc, words}]++; }

    // A line a note: instruction, how often, words.
    std::string text() const {
        std::string lines;
        for (const auto& [what, times] : noted)
            lines += std::to_string(what.first) + "\t" + std::to_string(times) + "\t" + what.second + "\n";
        return lines;
    }
};
