// A warp: registers, and where each of its lanes stands.
#pragma once
#include <vector>
#include "instruction.h"

// A register of all lanes. One of 64 bits takes two slots; of a predicate the first word has a bit a lane.
struct alignas(128) Slot {
    u32 words[LANES];
};

struct Warp {
    u32 block = 0, id = 0;  // numbers in the grid
    std::vector<Slot> registers;
    std::vector<u32> defined;  // bits of the lanes that wrote the register
    u32 pc[LANES] = {};
    u32 alive = 0, waiting = 0, at_barrier = 0;  // lanes; waiting in a *.sync, or in bar.sync
    u32 epoch = 0, block_epoch = 0;              // barriers passed: its own, and its block's

    u32 runnable() const { return alive & ~waiting & ~at_barrier; }
    bool has_arrived() const { return alive && at_barrier == alive; }

    u32* words(i32 slot) { return registers[slot].words; }
    u64* wides(i32 slot) { return reinterpret_cast<u64*>(registers[slot].words); }
    u32& predicate(i32 slot) { return registers[slot].words[0]; }

    void move_to(u32 lanes, u32 to) {
        each_lane(lanes, [&](int lane) { pc[lane] = to; });
    }
    u32 lanes_at(u32 lanes, u32 at) const {
        u32 found = 0;
        each_lane(lanes, [&](int lane) { found |= u32(pc[lane] == at) << lane; });
        return found;
    }
    void define(i32 slot, u32 lanes, u32 are_defined) {
        defined[slot] = (defined[slot] & ~lanes) | (are_defined & lanes);
    }
};
