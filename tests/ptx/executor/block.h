// A block: its warps and their shared memory.
#pragma once
#include "shared_memory.h"

struct Block {
    std::vector<Warp> warps;
    SharedMemory shared;

    Block(const Launch& launch, int x, int y, std::mt19937_64& random, Report& report)
        : warps((launch.block + LANES - 1) / LANES), shared(launch.shared_bytes, random, report) {
        for (size_t number = 0; number < warps.size(); number++)
            start(warps[number], number, launch, x, y, random);
    }

    bool is_alive() const {
        for (const Warp& warp : warps)
            if (warp.alive) return true;
        return false;
    }

   private:
    static void start(Warp& warp, int number, const Launch& launch, int x, int y, std::mt19937_64& random) {
        warp.block = y * launch.grid_x + x;
        warp.id = warp.block * ((launch.block + LANES - 1) / LANES) + number;
        warp.registers.resize(launch.slots);
        warp.defined.assign(launch.slots, 0);
        for (Slot& slot : warp.registers)
            for (u32& word : slot.words) word = random();  // what was there before
        const int left = launch.block - LANES * number;
        warp.alive = left >= LANES ? ALL_LANES : (1u << left) - 1;
        for (int i = 0; i < launch.constant_count; i++) set(warp, launch.constants[i]);
        for (const auto& [slot, value] :
             {std::pair{launch.ntid, launch.block}, {launch.ctaid_x, x}, {launch.ctaid_y, y},
              {launch.nctaid_x, launch.grid_x}, {launch.nctaid_y, launch.grid_y}})
            if (slot >= 0) set(warp, {u64(value), slot, 'w', {}});
        for (const auto& [slot, first] : {std::pair{launch.tid, LANES * number}, {launch.laneid, 0}}) {
            if (slot < 0) continue;
            warp.defined[slot] = ALL_LANES;
            for (int lane = 0; lane < LANES; lane++) warp.words(slot)[lane] = first + lane;
        }
    }

    static void set(Warp& warp, const Constant& constant) {
        warp.defined[constant.slot] = ALL_LANES;
        if (constant.width == 'p') warp.predicate(constant.slot) = constant.value ? ALL_LANES : 0;
        for (int lane = 0; lane < LANES && constant.width != 'p'; lane++) {
            if (constant.width == 'q') warp.wides(constant.slot)[lane] = constant.value;
            else warp.words(constant.slot)[lane] = constant.value;
        }
    }
};
