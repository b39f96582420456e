// Executes the PTX of a kernel: every lane has its own program counter, and lanes of a warp that stand
// at the same instruction may execute it together. Written from the PTX ISA alone.
//
// Two schedules. Converged: of a warp the lanes with the lowest program counter run first, which brings
// lanes together again behind a branch, as a GPU does; the counts of a profile are of this one. Random:
// any part of the lanes that stand together runs for any time, within what *.sync and bar.sync demand.
//
// Held against a kernel: addresses out of bounds, misaligned or read-only; what depends on registers or
// shared memory never written; races; lanes that wait for others who wait elsewhere or
// who ended; shuffles from lanes that take no part; an *.sync by a lane outside its own mask, or with
// different masks.
#include <algorithm>
#include <list>
#include <random>

#include "arithmetic.h"
#include "block.h"
#include "collectives.h"
#include "global_memory.h"
#include "wavefronts.h"

constexpr u64 LONG = 2000;  // instructions of a turn in the converged schedule

class Executor {
   public:
    Report report;

    explicit Executor(const Launch& launch)
        : launch(launch), random(launch.seed),
          global(launch.allocations, launch.allocation_count, report) {}

    // Throws Fault.
    void run() {
        std::list<Block> resident;
        for (int started = 0, blocks = launch.grid_x * launch.grid_y;;) {
            for (; int(resident.size()) < launch.resident && started < blocks; started++)
                resident.emplace_back(launch, started % launch.grid_x, started / launch.grid_x, random,
                                      report);
            if (resident.empty()) return;
            const auto chosen = std::next(resident.begin(), turn(resident.size()));
            if (chosen->is_alive()) run_part(*chosen);
            else resident.erase(chosen);
        }
    }

   private:
    const Launch& launch;
    std::mt19937_64 random;
    GlobalMemory global;
    u64 steps = 0;

    u64 turn(u64 count) { return launch.is_converged ? steps / LONG % count : random() % count; }

    // Some lanes of a warp of the block, for a time.
    void run_part(Block& block) {
        std::vector<Warp*> ready;
        for (Warp& warp : block.warps)
            if (warp.runnable()) ready.push_back(&warp);
        if (ready.empty()) tell_of_deadlock(block);
        Warp& warp = *ready[launch.is_converged ? 0 : random() % ready.size()];
        const u32 runnable = warp.runnable();
        if (launch.is_converged) {
            u32 first = ~0u;
            each_lane(runnable, [&](int lane) { first = std::min(first, warp.pc[lane]); });
            return run_lanes(block, warp, warp.lanes_at(runnable, first), LONG);
        }
        int lane = random() % LANES;
        while (!(runnable >> lane & 1)) lane = (lane + 1) % LANES;
        u32 lanes = warp.lanes_at(runnable, warp.pc[lane]);
        if (const u32 part = lanes & u32(random()); part && random() % 4) lanes = part;
        run_lanes(block, warp, lanes, 1 + random() % (random() % 8 ? 40 : 400));
    }

    [[noreturn]] void tell_of_deadlock(Block& block) {
        for (const Warp& warp : block.warps)
            each_lane(warp.alive, [&](int lane) {
                report.note("deadlock: a lane waits here for lanes that wait elsewhere", warp.pc[lane]);
            });
        throw Fault{"deadlock", block.warps[0].pc[0]};
    }

    // Until they part, wait, end, catch up with others (converged), or time is up.
    void run_lanes(Block& block, Warp& warp, u32 lanes, u64 time) {
        u32 pc = warp.pc[lowest(lanes)], others_at = ~0u;
        if (launch.is_converged)
            each_lane(warp.runnable() & ~lanes,
                      [&](int lane) { others_at = std::min(others_at, warp.pc[lane]); });
        for (; pc < others_at && time; time--) {
            if (++steps > launch.steps_limit) throw Fault{"more steps than the limit", pc};
            const Instruction& code = launch.code[pc];
            const u32 active = guarded(warp, code, lanes, pc);
            if (code.kind >= BRANCH) {
                warp.move_to(lanes & ~active, pc + 1);
                if (!active) { pc++; continue; }
                const bool goes_on = control(block, warp, code, active, pc) && active == lanes;
                if (!goes_on) return;
                pc = warp.pc[lowest(lanes)];
                continue;
            }
            count(pc, active);
            if (active) execute(block, warp, code, active, pc);
            pc++;
        }
        warp.move_to(lanes, pc);
    }

    u32 guarded(Warp& warp, const Instruction& code, u32 lanes, u32 pc) {
        if (code.guard < 0) return lanes;
        if (lanes & ~warp.defined[code.guard]) report.note("an undefined register decides", pc);
        return lanes & (warp.predicate(code.guard) ^ (code.has(NEGATED_GUARD) ? ALL_LANES : 0));
    }

    Count& count(u32 pc, u32 lanes) {
        Count& counted = launch.counts[pc];
        counted.executions++;
        counted.lanes += count_of(lanes);
        return counted;
    }

    // --- where lanes stand ---

    // Moves the lanes; do just these go on together?
    bool control(Block& block, Warp& warp, const Instruction& code, u32 lanes, u32 pc) {
        if (code.is_sync()) return wait(warp, code, lanes, pc);
        count(pc, lanes);
        if (code.kind == BRANCH) {
            warp.move_to(lanes, code.jump);
            return true;
        }
        warp.move_to(lanes, pc);
        if (code.kind == BARRIER) warp.at_barrier |= lanes;
        if (code.kind == RETURN) {
            warp.alive &= ~lanes;  // those who waited for them need not any more
            each_lane(warp.waiting, [&](int lane) {
                if (warp.waiting >> lane & 1) pass_sync(warp, warp.pc[lane]);
            });
        }
        pass_barrier(block, pc);
        return false;
    }

    bool wait(Warp& warp, const Instruction& code, u32 lanes, u32 pc) {
        for (int i = code.kind == SHUFFLE; i < code.sources; i++)  // a shuffle may hand on anything
            if (lanes & ~warp.defined[code.source[i]]) report.note("an undefined register decides", pc);
        warp.move_to(lanes, pc);
        warp.waiting |= lanes;
        return pass_sync(warp, pc) == lanes;
    }

    // The lanes that waited at `pc` and pass, because all that their mask names, and live, are there.
    u32 pass_sync(Warp& warp, u32 pc) {
        const Instruction& code = launch.code[pc];
        const u32* masks = warp.words(code.mask());
        const u32 there = warp.lanes_at(warp.waiting, pc);
        u32 named = 0;
        each_lane(there, [&](int lane) { named |= masks[lane]; });
        if ((there & named & warp.alive) != (named & warp.alive)) return 0;
        each_lane(there, [&](int lane) {
            if (!(masks[lane] >> lane & 1)) report.note("a *.sync by a lane outside its own mask", pc);
            if (masks[lane] != named) report.note("a *.sync with different masks", pc);
        });
        count(pc, there);
        if (code.kind == WARP_BARRIER) warp.epoch++;
        if (code.kind == VOTE) vote(warp, code, there);
        if (code.kind == MATCH) match(warp, code, there);
        if (code.kind == SHUFFLE) shuffle(warp, code, there, pc, report);
        warp.waiting &= ~there;
        warp.move_to(there, pc + 1);
        return there;
    }

    // All warps that live pass bar.sync when all of them are there.
    void pass_barrier(Block& block, u32 pc) {
        bool is_waited_for = false;
        for (const Warp& warp : block.warps) {
            if (warp.alive && !warp.has_arrived()) return;
            is_waited_for |= warp.has_arrived();
        }
        if (!is_waited_for) return;
        for (Warp& warp : block.warps) {
            if (!warp.alive) report.note("bar.sync in a block of which a warp has ended", pc);
            each_lane(warp.at_barrier, [&](int lane) { warp.pc[lane]++; });
            warp.at_barrier = 0;
            warp.block_epoch++;
        }
    }

    // --- what lanes do ---

    void execute(Block& block, Warp& warp, const Instruction& code, u32 lanes, u32 pc) {
        switch (code.kind) {
            case ARITHMETIC: case SELECT: {
                const u32 defined = defined_lanes(warp, code);
                operations()[code.operation].execute(warp, code, lanes);
                for (int i = 0; i < code.targets; i++) warp.define(code.target[i], lanes, defined);
                break;
            }
            case LOAD: case STORE: access(block, warp, code, lanes, pc); break;
            case ATOMIC_ADD: atomic_add(warp, code, lanes, pc); break;
            default: break;  // a fence
        }
    }

    // An undefined source makes an undefined result, which is a fault where it decides something.
    static u32 defined_lanes(Warp& warp, const Instruction& code) {
        const auto defined = [&](int i) { return warp.defined[code.source[i]]; };
        if (code.kind == SELECT) {  // only the one that is chosen counts
            const u32 chosen = warp.predicate(code.source[2]);
            return defined(2) & ((chosen & defined(0)) | (~chosen & defined(1)));
        }
        u32 found = ALL_LANES;
        for (int i = 0; i < code.sources; i++) found &= defined(i);
        return found;
    }

    void require_defined(Warp& warp, const Instruction& code, u32 lanes, u32 pc) {
        for (int i = 0; i < code.sources; i++)
            if (lanes & ~warp.defined[code.source[i]])
                report.note("an undefined address, or value stored", pc);
    }

    void atomic_add(Warp& warp, const Instruction& code, u32 lanes, u32 pc) {
        require_defined(warp, code, lanes, pc);
        std::vector<int> order;
        each_lane(lanes, [&](int lane) { order.push_back(lane); });
        if (!launch.is_converged) std::shuffle(order.begin(), order.end(), random);
        for (const int lane : order) {
            const u64 address = warp.wides(code.source[0])[lane] + code.offset;
            u32& word = *reinterpret_cast<u32*>(global.touch(ATOMIC, warp, lane, address, 4, false, pc));
            const u32 old = word;
            word += warp.words(code.source[1])[lane];
            warp.words(code.target[0])[lane] = old;
        }
        warp.define(code.target[0], lanes, ALL_LANES);
    }

    void access(Block& block, Warp& warp, const Instruction& code, u32 lanes, u32 pc) {
        require_defined(warp, code, lanes, pc);
        const bool is_load = code.kind == LOAD;
        const int values = is_load ? code.targets : code.sources - 1;
        const u32 size = code.size * values;
        u64 addresses[LANES];
        each_lane(lanes, [&](int lane) { addresses[lane] = address(warp, code, lane); });
        if (launch.is_converged && code.space != PARAMETER) {
            Count& counted = launch.counts[pc];
            counted.units += code.space == SHARED
                                 ? wavefronts(addresses, lanes, size)
                                 : global.measure(is_load ? READ : WRITE, addresses, lanes, size);
        }
        u32 written = lanes;  // memory that a load finds there
        each_lane(lanes, [&](int lane) {
            bool was_written = true;
            u8* bytes = place(block, warp, code, lane, addresses[lane], size, pc, was_written);
            if (is_load && !was_written) written &= ~(1u << lane);
            for (int i = 0; i < values; i++, bytes += code.size) {
                if (is_load) load_value(warp, code, code.target[i], lane, bytes);
                else store_value(warp, code, code.source[i + 1], lane, bytes);
            }
        });
        if (written != lanes) report.note("shared memory is read that was never written", pc);
        for (int i = 0; i < code.targets; i++) warp.define(code.target[i], lanes, written);
    }

    static u64 address(Warp& warp, const Instruction& code, int lane) {
        if (code.space == PARAMETER) return code.offset;
        if (code.space == GLOBAL) return warp.wides(code.source[0])[lane] + code.offset;
        return warp.words(code.source[0])[lane] + u32(code.offset);
    }

    u8* place(Block& block, Warp& warp, const Instruction& code, int lane, u64 address, u32 size, u32 pc,
              bool& was_written) {
        if (code.space == PARAMETER) {
            if (address + size > u64(launch.parameter_bytes)) throw Fault{"parameter out of bounds", pc};
            return const_cast<u8*>(launch.parameters) + address;
        }
        const Access access = code.kind == STORE ? WRITE : READ;
        if (code.space == GLOBAL)
            return global.touch(access, warp, lane, address, size, code.has(NON_COHERENT), pc);
        return block.shared.touch(access, warp, lane, address, size, pc, was_written);
    }

    static void load_value(Warp& warp, const Instruction& code, i32 slot, int lane, const u8* bytes) {
        u64 value = 0;
        memcpy(&value, bytes, code.size);
        const int unused = 64 - 8 * code.size;
        if (code.has(SIGNED)) value = u64(i64(value << unused) >> unused);
        if (code.has(WIDE)) warp.wides(slot)[lane] = value;
        else warp.words(slot)[lane] = value;
    }

    static void store_value(Warp& warp, const Instruction& code, i32 slot, int lane, u8* bytes) {
        const u64 value = code.has(WIDE) ? warp.wides(slot)[lane] : warp.words(slot)[lane];
        memcpy(bytes, &value, code.size);
    }
};

// --- what Python calls ---

static thread_local std::string said;

extern "C" const char* operation_mnemonic(int number) {
    return number < int(operations().size()) ? operations()[number].mnemonic.c_str() : nullptr;
}

extern "C" const char* operation_signature(int number) { return operations()[number].signature.c_str(); }

// What is held against the launch, a line each; empty where nothing is.
extern "C" const char* execute_launch(const Launch* launch) {
    Executor executor(*launch);
    try {
        executor.run();
    } catch (const Fault& fault) {
        executor.report.note(fault.words, fault.pc);
    }
    said = executor.report.text();
    return said.c_str();
}
