// An instruction and a launch, as Python hands them over (execution.py has the same structs).
#pragma once
#include "numbers.h"

enum Kind : u8 {
    ARITHMETIC, SELECT, LOAD, STORE, ATOMIC_ADD, FENCE, BRANCH, RETURN, BARRIER,
    WARP_BARRIER, VOTE, SHUFFLE, MATCH,  // *.sync: the lanes of a mask execute these together
};
enum Space : u8 { GLOBAL, SHARED, PARAMETER };
enum Vote : u8 { BALLOT, ANY, EVERY };
enum Shuffle : u8 { UP, DOWN, BUTTERFLY, INDEXED };
enum Flag : u8 {
    NEGATED_GUARD = 1,
    NEGATED_SOURCE = 2,
    NON_COHERENT = 4,  // a load through the read-only cache
    SIGNED = 8,        // a value loaded is sign-extended
    WIDE = 16,         // registers of a load or store have 64 bits
};

struct Instruction {
    u8 kind, mode, space, flags;
    u8 targets, sources, size, unused;  // size: bytes of each value loaded or stored
    i32 operation;                      // ARITHMETIC, SELECT: its number in operations()
    i32 guard;                          // a predicate register, -1: none
    i32 target[4], source[6];           // registers
    i32 jump;                           // BRANCH: an instruction
    i64 offset;                         // of an address

    bool is_sync() const { return kind >= WARP_BARRIER; }
    bool has(Flag flag) const { return flags & flag; }
    i32 mask() const { return source[sources - 1]; }  // of a *.sync
};

// Memory that the kernel may touch.
struct Allocation {
    u64 begin, size;
    u64 is_writable;
    u64 bytes_read, sectors_read;  // converged
};

// What executing an instruction did, by all groups of lanes.
struct Count {
    u64 executions, lanes;
    u64 units;  // converged: 32-byte sectors of global memory, wavefronts of shared memory
};

// A register that holds the same in all lanes from the beginning: a constant of the text.
struct Constant {
    u64 value;
    i32 slot;
    u8 width, unused[3];  // 'p', 'w' or 'q', as in operations()
};

struct Launch {
    const Instruction* code;
    i32 length, slots;
    const Constant* constants;
    i32 constant_count;
    i32 tid, ntid, ctaid_x, ctaid_y, nctaid_x, nctaid_y, laneid;  // slots of these, -1: not used
    i32 grid_x, grid_y, block, shared_bytes;
    i32 parameter_bytes;
    const u8* parameters;
    Allocation* allocations;
    i32 allocation_count;
    i32 is_converged;  // else lanes are scheduled at random
    i32 resident;      // blocks that run at once
    u64 seed, steps_limit;
    Count* counts;
};
