// The instructions that each lane executes for itself: PTX names, and the definition as C++.
//
// Types of the definition say which registers it takes: bool a predicate, 64-bit types two slots.
// Results follow the PTX ISA: shifts clamp, NaN is canonical, .ftz flushes operands and results.
#pragma once
#include <algorithm>
#include <string>
#include <type_traits>
#include <vector>
#include "warp.h"

typedef void (*Execute)(Warp&, const Instruction&, u32 lanes);

struct Operation {
    std::string mnemonic;
    std::string signature;  // widths of targets, a colon, those of sources: p predicate, q 64 bits, else w
    Execute execute;
};

template <class T>
inline T read(const Slot* slot, int lane) {
    if constexpr (std::is_same_v<T, bool>) return slot->words[0] >> lane & 1;
    T value;
    const int words = sizeof(T) == 8 ? 2 : 1;
    memcpy(&value, slot->words + words * lane, sizeof value);
    return value;
}

template <class T>
inline void write(Slot* slot, int lane, T value) {
    if constexpr (std::is_same_v<T, bool>) {
        slot->words[0] = (slot->words[0] & ~(1u << lane)) | u32(value) << lane;
    } else if constexpr (sizeof(T) == 8) {
        memcpy(slot->words + 2 * lane, &value, sizeof value);
    } else {
        u32 word = 0;
        memcpy(&word, &value, sizeof value);
        slot->words[lane] = word;
    }
}

template <class T>
constexpr char WIDTH = std::is_same_v<T, bool> ? 'p' : sizeof(T) == 8 ? 'q' : 'w';

// Two registers that one instruction writes.
template <class T>
struct Two {
    T low, high;
};

template <bool FLUSH, class T>
inline T operand(T value) {
    if constexpr (FLUSH && std::is_same_v<T, float>) return flushed(value);
    return value;
}

template <bool FLUSH, class T>
inline T result(T value) {
    if constexpr (std::is_same_v<T, float>) value = canonical(value);
    return operand<FLUSH>(value);
}

// The definition F, which is of a lambda without captures, for each lane.
template <class F, bool FLUSH, class Signature = decltype(&F::operator())>
struct Lanewise;

template <class F, bool FLUSH, class Result, class... Sources>
struct Lanewise<F, FLUSH, Result (F::*)(Sources...) const> {
    static void execute(Warp& warp, const Instruction& code, u32 lanes) {
        execute_with(warp, code, lanes, std::index_sequence_for<Sources...>());
    }

    template <size_t... I>
    static void execute_with(Warp& warp, const Instruction& code, u32 lanes, std::index_sequence<I...>) {
        const Slot* sources[] = {&warp.registers[code.source[I]]...};
        Slot* target = &warp.registers[code.target[0]];
        const auto one = [&](int lane) {
            const auto value = F{}(operand<FLUSH>(read<Sources>(sources[I], lane))...);
            if constexpr (requires { value.high; }) {
                write(target, lane, value.low);
                write(&warp.registers[code.target[1]], lane, value.high);
            } else {
                write(target, lane, result<FLUSH>(value));
            }
        };
        if (lanes == ALL_LANES)
            for (int lane = 0; lane < LANES; lane++) one(lane);
        else
            each_lane(lanes, one);
    }

    static std::string signature() {
        std::string widths;
        if constexpr (requires(Result value) { value.high; })
            widths = {WIDTH<decltype(Result::low)>, WIDTH<decltype(Result::high)>};
        else
            widths = {WIDTH<Result>};
        return widths + ':' + std::string{WIDTH<Sources>...};
    }
};

// Less or greater than a NaN is nothing; PTX has min(-0, 0) = -0.
inline float smaller(float a, float b) {
    if (a != a) return b;
    if (b != b) return a;
    if (a == b) return std::signbit(a) ? a : b;
    return a < b ? a : b;
}

class Operations {
   public:
    std::vector<Operation> all;

    Operations() {
        integers();
        bit_fields();
        wide_products();
        predicates();
        conversions();
        floats();
        doubles();
    }

   private:
    // Under several names, separated by blanks.
    template <bool FLUSH = false, class F>
    void add(const std::string& mnemonics, F) {
        typedef Lanewise<F, FLUSH> Made;
        for (size_t begin = 0; begin < mnemonics.size();) {
            const size_t end = std::min(mnemonics.find(' ', begin), mnemonics.size());
            all.push_back({mnemonics.substr(begin, end - begin), Made::signature(), &Made::execute});
            begin = end + 1;
        }
    }

    // With `.ftz` before the types, and without.
    template <class F>
    void add_float(const std::string& stem, const std::string& types, F f) {
        add(stem + types, f);
        add<true>(stem + ".ftz" + types, f);
    }

    void integers() {
        add("mov.b16 mov.u16 mov.s16", [](u16 a) { return a; });
        add("mov.b32 mov.u32 mov.s32 mov.f32", [](u32 a) { return a; });
        add("mov.b64 mov.u64 mov.s64 mov.f64 cvta.to.global.u64 cvta.global.u64", [](u64 a) { return a; });
        add("pack.b64", [](u32 a, u32 b) { return a | u64(b) << 32; });
        add("pack.b32", [](u16 a, u16 b) { return a | u32(b) << 16; });
        add("unpack.b64", [](u64 a) { return Two<u32>{u32(a), u32(a >> 32)}; });
        add("unpack.b32", [](u32 a) { return Two<u16>{u16(a), u16(a >> 16)}; });

        add("add.s16 add.u16", [](u16 a, u16 b) { return u16(a + b); });
        add("sub.s16 sub.u16", [](u16 a, u16 b) { return u16(a - b); });
        add("mul.lo.s16 mul.lo.u16", [](u16 a, u16 b) { return u16(u32(a) * b); });
        add("add.s32 add.u32", [](u32 a, u32 b) { return a + b; });
        add("sub.s32 sub.u32", [](u32 a, u32 b) { return a - b; });
        add("mul.lo.s32 mul.lo.u32", [](u32 a, u32 b) { return a * b; });
        add("mad.lo.s32 mad.lo.u32", [](u32 a, u32 b, u32 c) { return a * b + c; });
        add("add.s64 add.u64", [](u64 a, u64 b) { return a + b; });
        add("sub.s64 sub.u64", [](u64 a, u64 b) { return a - b; });
        add("mul.lo.s64 mul.lo.u64", [](u64 a, u64 b) { return a * b; });
        add("mad.lo.s64 mad.lo.u64", [](u64 a, u64 b, u64 c) { return a * b + c; });
        add("neg.s32", [](u32 a) { return -a; });
        add("neg.s64", [](u64 a) { return -a; });
        add("abs.s32", [](i32 a) { return a < 0 ? -u32(a) : u32(a); });
        add("abs.s64", [](i64 a) { return a < 0 ? -u64(a) : u64(a); });
        add("min.s32", [](i32 a, i32 b) { return std::min(a, b); });
        add("min.u32", [](u32 a, u32 b) { return std::min(a, b); });
        add("max.s32", [](i32 a, i32 b) { return std::max(a, b); });
        add("max.u32", [](u32 a, u32 b) { return std::max(a, b); });
        add("min.s64", [](i64 a, i64 b) { return std::min(a, b); });
        add("min.u64", [](u64 a, u64 b) { return std::min(a, b); });
        add("max.s64", [](i64 a, i64 b) { return std::max(a, b); });
        add("max.u64", [](u64 a, u64 b) { return std::max(a, b); });

        add("and.b16", [](u16 a, u16 b) { return u16(a & b); });
        add("or.b16", [](u16 a, u16 b) { return u16(a | b); });
        add("xor.b16", [](u16 a, u16 b) { return u16(a ^ b); });
        add("not.b16", [](u16 a) { return u16(~a); });
        add("and.b32", [](u32 a, u32 b) { return a & b; });
        add("or.b32", [](u32 a, u32 b) { return a | b; });
        add("xor.b32", [](u32 a, u32 b) { return a ^ b; });
        add("not.b32", [](u32 a) { return ~a; });
        add("and.b64", [](u64 a, u64 b) { return a & b; });
        add("or.b64", [](u64 a, u64 b) { return a | b; });
        add("xor.b64", [](u64 a, u64 b) { return a ^ b; });
        add("not.b64", [](u64 a) { return ~a; });

        add("shl.b16", [](u16 a, u32 by) { return u16(by > 15 ? 0 : a << by); });
        add("shr.u16 shr.b16", [](u16 a, u32 by) { return u16(by > 15 ? 0 : a >> by); });
        add("shr.s16", [](i16 a, u32 by) { return i16(a >> std::min(by, 15u)); });
        add("shl.b32", [](u32 a, u32 by) { return u32(shifted_left(a, by)); });
        add("shr.u32 shr.b32", [](u32 a, u32 by) { return u32(shifted_right(a, by)); });
        add("shr.s32", [](i32 a, u32 by) { return a >> std::min(by, 31u); });
        add("shl.b64", [](u64 a, u32 by) { return shifted_left(a, by); });
        add("shr.u64 shr.b64", [](u64 a, u32 by) { return shifted_right(a, by); });
        add("shr.s64", [](i64 a, u32 by) { return a >> std::min(by, 63u); });
    }

    void bit_fields() {
        add("popc.b32", [](u32 a) { return u32(__builtin_popcount(a)); });
        add("popc.b64", [](u64 a) { return u32(__builtin_popcountll(a)); });
        add("clz.b32", [](u32 a) { return u32(a ? __builtin_clz(a) : 32); });
        add("clz.b64", [](u64 a) { return u32(a ? __builtin_clzll(a) : 64); });
        add("bfind.u32", [](u32 a) { return a ? 31 - u32(__builtin_clz(a)) : ~0u; });
        add("bfind.shiftamt.u32", [](u32 a) { return a ? u32(__builtin_clz(a)) : ~0u; });
        add("brev.b32", [](u32 a) {
            u32 reversed = 0;
            for (int i = 0; i < 32; i++) reversed |= (a >> i & 1) << (31 - i);
            return reversed;
        });
        // of `length` bits at `place`; both numbers have 8 bits
        add("bfi.b32", [](u32 field, u32 into, u32 place, u32 length) {
            const u64 where = shifted_left(ones(length & 255), place & 255);
            return u32((into & ~where) | (shifted_left(field, place & 255) & where));
        });
        add("bfi.b64", [](u64 field, u64 into, u32 place, u32 length) {
            const u64 where = shifted_left(ones(length & 255), place & 255);
            return (into & ~where) | (shifted_left(field, place & 255) & where);
        });
        add("bfe.u32", [](u32 a, u32 place, u32 length) {
            return u32(shifted_right(a, place & 255) & ones(length & 255));
        });
        add("bfe.s32", [](i32 a, u32 place, u32 length) {
            const i32 rest = a >> std::min(place & 255, 31u);
            const u32 unused = 32 - std::min(length & 255, 32u);
            return unused == 32 ? 0 : i32(u32(rest) << unused) >> unused;
        });
        add("lop3.b32", [](u32 a, u32 b, u32 c, u32 table) {  // bit abc of the table
            u32 found = 0;
            for (int i = 0; i < 8; i++)
                if (table >> i & 1) found |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
            return found;
        });
        // of the 64 bits ba, the upper or the lower word after a shift
        add("shf.l.wrap.b32", [](u32 a, u32 b, u32 by) {
            return u32((u64(b) << 32 | a) << (by & 31) >> 32);
        });
        add("shf.r.wrap.b32", [](u32 a, u32 b, u32 by) { return u32((u64(b) << 32 | a) >> (by & 31)); });
        add("shf.l.clamp.b32", [](u32 a, u32 b, u32 by) {
            return u32((u64(b) << 32 | a) << std::min(by, 32u) >> 32);
        });
        add("shf.r.clamp.b32", [](u32 a, u32 b, u32 by) {
            return u32((u64(b) << 32 | a) >> std::min(by, 32u));
        });
        add("prmt.b32", [](u32 a, u32 b, u32 selectors) {  // four bytes of ba, or their signs
            u32 found = 0;
            for (int i = 0; i < 4; i++) {
                const u32 selector = selectors >> 4 * i;
                u32 byte = (u64(b) << 32 | a) >> 8 * (selector & 7) & 255;
                if (selector & 8) byte = byte & 128 ? 255 : 0;
                found |= byte << 8 * i;
            }
            return found;
        });
    }

    void wide_products() {
        add("mul.hi.u32", [](u32 a, u32 b) { return u32(u64(a) * b >> 32); });
        add("mul.hi.s32", [](i32 a, i32 b) { return u32(i64(a) * b >> 32); });
        add("mul.hi.u64", [](u64 a, u64 b) { return u64((unsigned __int128)a * b >> 64); });
        add("mul.wide.u32", [](u32 a, u32 b) { return u64(a) * b; });
        add("mul.wide.s32", [](i32 a, i32 b) { return i64(a) * b; });
        add("mul.wide.u16", [](u16 a, u16 b) { return u32(a) * b; });
        add("mul.wide.s16", [](i16 a, i16 b) { return i32(a) * b; });
        add("mad.wide.u32", [](u32 a, u32 b, u64 c) { return u64(a) * b + c; });
        add("mad.wide.s32", [](i32 a, i32 b, u64 c) { return u64(i64(a) * b) + c; });
        add("dp4a.s32.s32", [](u32 a, u32 b, u32 c) {
            for (int i = 0; i < 32; i += 8) c += i8(a >> i) * i8(b >> i);
            return c;
        });
        add("dp4a.u32.u32", [](u32 a, u32 b, u32 c) {
            for (int i = 0; i < 32; i += 8) c += u8(a >> i) * u8(b >> i);
            return c;
        });
    }

    template <class T>
    void comparisons(const std::string& types) {
        add("setp.eq" + types, [](T a, T b) { return a == b; });
        add("setp.ne" + types, [](T a, T b) { return a != b; });
        add("setp.lt" + types, [](T a, T b) { return a < b; });
        add("setp.le" + types, [](T a, T b) { return a <= b; });
        add("setp.gt" + types, [](T a, T b) { return a > b; });
        add("setp.ge" + types, [](T a, T b) { return a >= b; });
    }

    void predicates() {
        add("mov.pred", [](bool a) { return a; });
        add("not.pred", [](bool a) { return !a; });
        add("and.pred", [](bool a, bool b) { return a && b; });
        add("or.pred", [](bool a, bool b) { return a || b; });
        add("xor.pred", [](bool a, bool b) { return a != b; });
        add("selp.b16 selp.u16 selp.s16", [](u16 a, u16 b, bool p) { return p ? a : b; });
        add("selp.b32 selp.u32 selp.s32 selp.f32", [](u32 a, u32 b, bool p) { return p ? a : b; });
        add("selp.b64 selp.u64 selp.s64 selp.f64", [](u64 a, u64 b, bool p) { return p ? a : b; });
        comparisons<i16>(".s16");
        comparisons<u16>(".u16");
        comparisons<u16>(".b16");
        comparisons<i32>(".s32");
        comparisons<u32>(".u32");
        comparisons<u32>(".b32");
        comparisons<i64>(".s64");
        comparisons<u64>(".u64");
        comparisons<u64>(".b64");
        float_comparisons<float>(".f32");
        float_comparisons<double>(".f64");
    }

    // The ordinary ones are false beside a NaN, those with a u true.
    template <class T>
    void float_comparisons(const std::string& types) {
        add_float("setp.eq", types, [](T a, T b) { return a == b; });
        add_float("setp.ne", types, [](T a, T b) { return a < b || a > b; });
        add_float("setp.lt", types, [](T a, T b) { return a < b; });
        add_float("setp.le", types, [](T a, T b) { return a <= b; });
        add_float("setp.gt", types, [](T a, T b) { return a > b; });
        add_float("setp.ge", types, [](T a, T b) { return a >= b; });
        add_float("setp.equ", types, [](T a, T b) { return !(a < b || a > b); });
        add_float("setp.neu", types, [](T a, T b) { return a != b; });
        add_float("setp.ltu", types, [](T a, T b) { return !(a >= b); });
        add_float("setp.leu", types, [](T a, T b) { return !(a > b); });
        add_float("setp.gtu", types, [](T a, T b) { return !(a <= b); });
        add_float("setp.geu", types, [](T a, T b) { return !(a < b); });
        add_float("setp.num", types, [](T a, T b) { return a == a && b == b; });
        add_float("setp.nan", types, [](T a, T b) { return a != a || b != b; });
    }

    void conversions() {
        add("cvt.s64.s32", [](i32 a) { return i64(a); });
        add("cvt.u64.u32", [](u32 a) { return u64(a); });
        add("cvt.u32.u64 cvt.s32.s64 cvt.u32.s64 cvt.s32.u64", [](u64 a) { return u32(a); });
        add("cvt.u16.u32 cvt.s16.s32 cvt.u16.s32 cvt.s16.u32", [](u32 a) { return u16(a); });
        add("cvt.s32.s16", [](i16 a) { return i32(a); });
        add("cvt.u32.u16", [](u16 a) { return u32(a); });
        add("cvt.s32.s8", [](i8 a) { return i32(a); });
        add("cvt.u32.u8", [](u8 a) { return u32(a); });
        add("cvt.f32.f16", [](u16 a) { return float_of_half(a); });
        add("cvt.rn.f32.s32", [](i32 a) { return float(a); });
        add("cvt.rn.f32.u32", [](u32 a) { return float(a); });
        add_float("cvt", ".f64.f32", [](float a) { return double(a); });
        add_float("cvt.rn", ".f32.f64", [](double a) { return float(a); });
        add_float("cvt.rni", ".f32.f32", [](float a) { return std::nearbyint(a); });
        add_float("cvt.rzi", ".s32.f32", [](float a) {
            if (a != a) return 0;
            return a >= 0x1p31f ? INT32_MAX : a < -0x1p31f ? INT32_MIN : i32(a);
        });
    }

    void floats() {
        for (const std::string rounding : {"", ".rn"}) {
            add_float("add" + rounding, ".f32", [](float a, float b) { return a + b; });
            add_float("sub" + rounding, ".f32", [](float a, float b) { return a - b; });
            add_float("mul" + rounding, ".f32", [](float a, float b) { return a * b; });
        }
        add_float("fma.rn", ".f32", [](float a, float b, float c) { return std::fma(a, b, c); });
        add_float("div.rn", ".f32", [](float a, float b) { return a / b; });
        add_float("sqrt.rn", ".f32", [](float a) { return std::sqrt(a); });
        add_float("min", ".f32", [](float a, float b) { return smaller(a, b); });
        add_float("max", ".f32", [](float a, float b) { return -smaller(-a, -b); });
        add_float("abs", ".f32", [](float a) { return std::fabs(a); });
        add_float("neg", ".f32", [](float a) { return -a; });
    }

    void doubles() {
        add("add.f64 add.rn.f64", [](double a, double b) { return a + b; });
        add("sub.f64 sub.rn.f64", [](double a, double b) { return a - b; });
        add("mul.f64 mul.rn.f64", [](double a, double b) { return a * b; });
        add("fma.rn.f64", [](double a, double b, double c) { return std::fma(a, b, c); });
        add("div.rn.f64", [](double a, double b) { return a / b; });
        add("sqrt.rn.f64", [](double a) { return std::sqrt(a); });
        add("abs.f64", [](double a) { return std::fabs(a); });
        add("neg.f64", [](double a) { return -a; });
    }
};

inline const std::vector<Operation>& operations() {
    static const Operations made;
    return made.all;
}
