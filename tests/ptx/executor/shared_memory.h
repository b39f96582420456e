// Shared memory of a block, which remembers who touched each word since which barrier.
//
// Only bar.warp.sync orders the lanes of a warp, and only bar.sync the warps of a block: whatever else
// puts two accesses in order on some schedule is luck, and a race.
#pragma once
#include <random>
#include <vector>
#include "report.h"
#include "warp.h"

constexpr u32 SHARED_BASE = 1024;  // where dynamic shared memory begins; as on sm_80, not at 0

class SharedMemory {
   public:
    SharedMemory(u32 size, std::mt19937_64& random, Report& report)
        : size(size), bytes(size + 16), history((size + 3) / 4), report(report) {
        for (u8& byte : bytes) byte = random();  // what the block before left
    }

    void pass_barrier() { block_epoch++; }

    u8* store(const Warp& warp, int lane, u32 address, u32 length, u32 pc) {
        u8* place = checked(address, length, pc);
        for (Word* word = word_of(address); word <= word_of(address + length - 1); word++) {
            if (is_of_others(*word, warp, lane)) report.note("race: write after write", pc);
            if (was_read_by_others(*word, warp, lane)) report.note("race: write after read", pc);
            word->was_written = true;
            word->write_block = block_epoch;
            word->write_warp = warp.epoch;
            word->writer = warp.number * LANES + lane;
        }
        return place;
    }

    // was_written: did somebody write all of it?
    u8* load(const Warp& warp, int lane, u32 address, u32 length, u32 pc, bool& was_written) {
        u8* place = checked(address, length, pc);
        was_written = true;
        for (Word* word = word_of(address); word <= word_of(address + length - 1); word++) {
            if (is_of_others(*word, warp, lane)) report.note("race: read after write", pc);
            was_written &= word->was_written;
            remember_reader(*word, warp, lane);
        }
        return place;
    }

   private:
    struct Word {  // epochs are those of its last write and of its last read
        u32 write_block, write_warp, writer;
        u32 read_block, read_warp, reading_warp, reading_lanes;
        bool was_written, was_read_by_many_warps;
    };

    Word* word_of(u32 address) { return &history[(address - SHARED_BASE) / 4]; }

    u8* checked(u32 address, u32 length, u32 pc) {
        const u32 offset = address - SHARED_BASE;
        if (offset >= size || length > size - offset) throw Fault{"shared access out of bounds", pc};
        if (address % length) throw Fault{"misaligned shared access", pc};
        u8* begin = bytes.data() + (16 - u64(bytes.data()) % 16) % 16;
        return begin + offset;
    }

    // Written by another lane, with no barrier since that both passed?
    bool is_of_others(const Word& word, const Warp& warp, int lane) const {
        if (word.write_block != block_epoch || word.writer == u32(warp.number * LANES + lane)) return false;
        return word.writer / LANES != u32(warp.number) || word.write_warp == warp.epoch;
    }

    bool was_read_by_others(const Word& word, const Warp& warp, int lane) const {
        if (word.read_block != block_epoch) return false;
        if (word.was_read_by_many_warps || word.reading_warp != u32(warp.number)) return true;
        return word.read_warp == warp.epoch && word.reading_lanes & ~(1u << lane);
    }

    void remember_reader(Word& word, const Warp& warp, int lane) {
        const bool is_first = word.read_block != block_epoch;
        const bool is_same_warp = !is_first && word.reading_warp == u32(warp.number);
        word.was_read_by_many_warps = !is_first && (word.was_read_by_many_warps || !is_same_warp);
        if (!is_same_warp || word.read_warp != warp.epoch) word.reading_lanes = 0;
        word.read_block = block_epoch;
        word.read_warp = warp.epoch;
        word.reading_warp = warp.number;
        word.reading_lanes |= 1u << lane;
    }

    const u32 size;
    std::vector<u8> bytes;
    std::vector<Word> history;
    u32 block_epoch = 1;
    Report& report;
};
