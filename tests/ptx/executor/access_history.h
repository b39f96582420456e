// Who touched a piece of memory last, since which barrier: what a race is told by.
//
// Only bar.warp.sync orders the lanes of a warp, only bar.sync the warps of a block, and nothing two
// blocks: whatever else puts two accesses in order on some schedule is luck.
#pragma once
#include "warp.h"

enum Access : u8 { READ, WRITE, ATOMIC };

class AccessHistory {
   public:
    bool was_written() const { return write.warp != NOBODY; }

    // What this access races with, or null; the access is remembered.
    const char* touch(Access access, const Warp& warp, int lane) {
        const char* found = nullptr;
        if (access != READ && was_read_by_others(warp, lane)) found = "race: write after read";
        if (was_written_by_others(access, warp, lane))
            found = access == READ ? "race: read after write" : "race: write after write";
        if (access == READ) remember_read(warp, lane);
        else write = stamp(warp, lane, access == ATOMIC);
        return found;
    }

   private:
    static constexpr u32 NOBODY = ~0u;
    struct Stamp {
        u32 block, warp = NOBODY, block_epoch, warp_epoch;
        u8 lane;
        bool is_atomic;
    };

    static Stamp stamp(const Warp& warp, int lane, bool is_atomic) {
        return {warp.block, warp.id, warp.block_epoch, warp.epoch, u8(lane), is_atomic};
    }

    static bool has_block_barrier_since(const Stamp& earlier, const Warp& warp) {
        return earlier.block == warp.block && earlier.block_epoch != warp.block_epoch;
    }

    bool was_written_by_others(Access access, const Warp& warp, int lane) const {
        if (!was_written() || has_block_barrier_since(write, warp)) return false;
        if (write.is_atomic && access == ATOMIC) return false;
        if (write.warp != warp.id) return true;
        return write.warp_epoch == warp.epoch && write.lane != lane;
    }

    bool was_read_by_others(const Warp& warp, int lane) const {
        if (read.warp == NOBODY || has_block_barrier_since(read, warp)) return false;
        if (was_read_by_many_warps || read.warp != warp.id) return true;
        return read.warp_epoch == warp.epoch && reading_lanes & ~(1u << lane);
    }

    void remember_read(const Warp& warp, int lane) {
        const bool is_first = read.warp == NOBODY || has_block_barrier_since(read, warp);
        const bool is_same_warp = !is_first && read.warp == warp.id;
        was_read_by_many_warps = !is_first && (was_read_by_many_warps || !is_same_warp);
        if (!is_same_warp || read.warp_epoch != warp.epoch) reading_lanes = 0;
        read = stamp(warp, lane, false);
        reading_lanes |= 1u << lane;
    }

    Stamp write, read;
    u32 reading_lanes = 0;  // of the warp that read last, since its last barrier
    bool was_read_by_many_warps = false;
};
