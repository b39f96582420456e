// Global memory: only what the launch names may be touched, only aligned, and what is written has a
// history, byte by byte.
#pragma once
#include <set>
#include <unordered_map>
#include <utility>
#include "access_history.h"
#include "instruction.h"
#include "report.h"

class GlobalMemory {
   public:
    GlobalMemory(Allocation* allocations, int count, Report& report)
        : allocations(allocations), count(count), report(report) {}

    u8* touch(Access access, const Warp& warp, int lane, u64 address, u32 size, bool is_non_coherent,
              u32 pc) {
        const Allocation* found = around(address, size);
        if (!found)
            throw Fault{access == READ ? "global load out of bounds" : "global store out of bounds", pc};
        if (address % size) throw Fault{"misaligned global access", pc};
        if (access != READ && !found->is_writable) throw Fault{"store to read-only memory", pc};
        for (u64 byte = address; found->is_writable && byte < address + size; byte++) {
            AccessHistory& history = of_byte[byte];
            if (is_non_coherent && history.was_written())
                report.note("a non-coherent load of memory that the kernel writes", pc);
            if (const char* race = history.touch(access, warp, lane)) report.note(race, pc);
        }
        return reinterpret_cast<u8*>(address);
    }

    // 32-byte sectors that the lanes touch, as on a GPU, where every array begins on a boundary of 256
    // bytes. An access is aligned, so it lies in one.
    u64 measure(Access access, const u64 (&addresses)[LANES], u32 lanes, u32 size) {
        std::set<std::pair<Allocation*, u64>> seen;
        each_lane(lanes, [&](int lane) {
            Allocation* one = around(addresses[lane], size);
            if (!one) return;
            seen.insert({one, (addresses[lane] - one->begin) / 32});
            if (access == READ) one->bytes_read += size;
        });
        for (const auto& [one, sector] : seen) one->sectors_read += access == READ;
        return seen.size();
    }

   private:
    Allocation* around(u64 address, u32 size) {
        for (int i = 0; i < count; i++) {
            const u64 offset = address - allocations[i].begin;
            if (offset < allocations[i].size && offset + size <= allocations[i].size) return &allocations[i];
        }
        return nullptr;
    }

    Allocation* allocations;
    int count;
    std::unordered_map<u64, AccessHistory> of_byte;  // of writable memory
    Report& report;
};
