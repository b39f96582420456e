// Global memory: only what the launch names may be touched, and only aligned.
#pragma once
#include "report.h"
#include "instruction.h"

struct GlobalMemory {
    Allocation* allocations;
    int count;
    Report& report;

    u8* load(u64 address, u32 size, bool is_non_coherent, u32 pc) {
        const Allocation& found = find(address, size, "global load out of bounds", pc);
        if (is_non_coherent && found.was_written)
            report.note("a non-coherent load of memory that the kernel writes", pc);
        return reinterpret_cast<u8*>(address);
    }

    u8* store(u64 address, u32 size, u32 pc) {
        Allocation& found = find(address, size, "global store out of bounds", pc);
        if (!found.is_writable) throw Fault{"store to read-only memory", pc};
        found.was_written = 1;
        return reinterpret_cast<u8*>(address);
    }

   private:
    Allocation& find(u64 address, u32 size, const char* words, u32 pc) {
        for (int i = 0; i < count; i++) {
            Allocation& one = allocations[i];
            if (address - one.begin >= one.size || address - one.begin + size > one.size) continue;
            if (address % size) throw Fault{"misaligned global access", pc};
            return one;
        }
        throw Fault{words, pc};
    }
};
