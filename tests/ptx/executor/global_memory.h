// Global memory: only what the launch names may be touched, only aligned, and what is written has a
// history, byte by byte.
#pragma once
#include <unordered_map>
#include "access_history.h"
#include "instruction.h"
#include "report.h"

class GlobalMemory {
   public:
    GlobalMemory(Allocation* allocations, int count, Report& report)
        : allocations(allocations), count(count), report(report) {}

    u8* touch(Access access, const Warp& warp, int lane, u64 address, u32 size, bool is_non_coherent, u32 pc) {
        const Allocation& found = find(address, size, access == READ, pc);
        if (access != READ && !found.is_writable) throw Fault{"store to read-only memory", pc};
        for (u64 byte = address; found.is_writable && byte < address + size; byte++) {
            AccessHistory& history = of_byte[byte];
            if (is_non_coherent && history.was_written())
                report.note("a non-coherent load of memory that the kernel writes", pc);
            if (const char* race = history.touch(access, warp, lane)) report.note(race, pc);
        }
        return reinterpret_cast<u8*>(address);
    }

    // The address as it would be on a GPU, where every array begins on a boundary of 256 bytes.
    u64 placed(u64 address) const {
        for (int i = 0; i < count; i++)
            if (address - allocations[i].begin < allocations[i].size)
                return (u64(i + 1) << 40) + address - allocations[i].begin;
        return address;
    }

   private:
    const Allocation& find(u64 address, u32 size, bool is_load, u32 pc) const {
        for (int i = 0; i < count; i++) {
            const Allocation& one = allocations[i];
            if (address - one.begin >= one.size || address - one.begin + size > one.size) continue;
            if (address % size) throw Fault{"misaligned global access", pc};
            return one;
        }
        throw Fault{is_load ? "global load out of bounds" : "global store out of bounds", pc};
    }

    Allocation* allocations;
    int count;
    std::unordered_map<u64, AccessHistory> of_byte;  // of writable memory
    Report& report;
};
