// The *.sync instructions, by the lanes that execute them together.
#pragma once
#include "report.h"
#include "warp.h"

inline void vote(Warp& warp, const Instruction& code, u32 lanes) {
    const u32 source = warp.predicate(code.source[0]) ^ (code.has(NEGATED_SOURCE) ? ALL_LANES : 0);
    const u32 set = source & lanes;
    if (code.mode == BALLOT) {
        each_lane(lanes, [&](int lane) { warp.words(code.target[0])[lane] = set; });
    } else {
        const bool is_so = code.mode == ANY ? set != 0 : set == lanes;
        u32& target = warp.predicate(code.target[0]);
        target = is_so ? target | lanes : target & ~lanes;
    }
    warp.define(code.target[0], lanes, ALL_LANES);
}

// match.any: each lane gets the lanes with its value.
inline void match(Warp& warp, const Instruction& code, u32 lanes) {
    const Slot values = warp.registers[code.source[0]];
    each_lane(lanes, [&](int lane) {
        u32 same = 0;
        each_lane(lanes, [&](int other) { same |= u32(values.words[other] == values.words[lane]) << other; });
        warp.words(code.target[0])[lane] = same;
    });
    warp.define(code.target[0], lanes, ALL_LANES);
}

// The lane that a lane takes its value from, or -1 where that is out of its segment. b and c are the
// second and third operand: c holds the clamp and the mask of a segment.
inline int shuffle_source(u8 mode, int lane, u32 b, u32 c) {
    const int by = b & 31, clamp = c & 31, segment = c >> 8 & 31;
    const int most = (lane & segment) | (clamp & ~segment), least = lane & segment;
    if (mode == UP) return lane - by >= most ? lane - by : -1;
    const int from = mode == DOWN ? lane + by : mode == BUTTERFLY ? lane ^ by : least | (by & ~segment);
    return from <= most ? from : -1;
}

inline void shuffle(Warp& warp, const Instruction& code, u32 lanes, u32 pc, Report& report) {
    const Slot values = warp.registers[code.source[0]];
    const u32 values_defined = warp.defined[code.source[0]];
    u32 in_range = 0, defined = 0;
    each_lane(lanes, [&](int lane) {
        const u32 b = warp.words(code.source[1])[lane], c = warp.words(code.source[2])[lane];
        int from = shuffle_source(code.mode, lane, b, c);
        in_range |= u32(from >= 0) << lane;
        if (from < 0) from = lane;
        if (!(lanes >> from & 1)) report.note("a shuffle from a lane that takes no part", pc);
        warp.words(code.target[0])[lane] = values.words[from];
        defined |= (values_defined >> from & 1) << lane;
    });
    warp.define(code.target[0], lanes, defined);
    if (code.targets == 1) return;
    u32& target = warp.predicate(code.target[1]);
    target = (target & ~lanes) | in_range;
    warp.define(code.target[1], lanes, ALL_LANES);
}
