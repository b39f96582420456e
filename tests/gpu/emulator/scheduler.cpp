// Runs a grid: its blocks one after another in random order, every lane of a block as a fiber.
//
// A lane runs until it meets others (emulator::meet) or ends; then one of the lanes that can run is
// drawn from the seed. So equal seeds give equal runs, and a kernel that is right gives the same
// bits for all seeds. Whatever goes wrong ends the launch with a message: fail() leaves the fibers
// where they are and goes back to launch().
//
// Compiled without instrumentation. EMULATE_ADDRESS and EMULATE_THREAD tell that the kernel has it,
// and what a sanitizer must know of fibers and of barriers.

#include "cuda_emulator.h"

#include <algorithm>
#include <new>
#include <numeric>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <string>
#include <sys/mman.h>
#include <sys/time.h>
#include <vector>

extern "C" void emulator_entry(void** arguments);  // generated: calls the kernel

#ifdef EMULATE_ADDRESS
extern "C" {
void __asan_poison_memory_region(const volatile void* begin, size_t size);
void __asan_unpoison_memory_region(const volatile void* begin, size_t size);
void __sanitizer_start_switch_fiber(void** save, const void* bottom, size_t size);
void __sanitizer_finish_switch_fiber(void* save, const void** bottom, size_t* size);
}
#endif

#ifdef EMULATE_THREAD
extern "C" {
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
}
constexpr unsigned NO_ORDER = 1;  // a switch alone orders nothing
#endif

// --- stacks ---

#if defined(__x86_64__) && defined(__linux__)

// Saves what a call must preserve and the stack pointer; goes on where `to` was saved.
extern "C" void emulator_switch_stack(void** from, void* to);
asm(R"(
    .text
    .type emulator_switch_stack, @function
emulator_switch_stack:
    pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
    ret
    .size emulator_switch_stack, . - emulator_switch_stack
)");

struct Stack {
    void* pointer;

    void start(unsigned char* bottom, size_t size, void (*function)()) {
        void** top = reinterpret_cast<void**>(bottom + size);
        top[-2] = reinterpret_cast<void*>(function);  // where the first switch returns to
        top[-1] = nullptr;
        pointer = top - 2 - 6;
    }
    static void change(Stack& from, Stack& to) { emulator_switch_stack(&from.pointer, to.pointer); }
};

#else

#include <ucontext.h>

struct Stack {
    ucontext_t context;

    void start(unsigned char* bottom, size_t size, void (*function)()) {
        getcontext(&context);
        context.uc_stack.ss_sp = bottom;
        context.uc_stack.ss_size = size;
        context.uc_link = nullptr;
        makecontext(&context, function, 0);
    }
    static void change(Stack& from, Stack& to) { swapcontext(&from.context, &to.context); }
};

#endif

namespace emulator {

const uint3* thread;
uint3 block;
dim3 block_size, grid_size;
unsigned char* shared;

namespace {

constexpr size_t PAGE = 16384;  // or a multiple of it
constexpr size_t STACK_BYTES = 8 * PAGE;
constexpr int POISON = 0xcb;

struct Fiber {
    Stack stack;
    const void* bottom;
    size_t size;
    void* fake_stack;   // the address sanitizer's
    void* tsan;         // the thread sanitizer's
    bool has_exited;
};

struct Lane : Fiber {
    uint3 index;
    unsigned number;   // in its block
    // Where it waits, or last did:
    Kind kind;
    const char* word;  // null: it met nobody yet
    unsigned mask;
    Bits value;
    int source;
    Site site;
    Bits result;

    unsigned bit() const { return 1u << number % 32; }
};

struct Warp {
    unsigned present;  // lanes that the block has
    unsigned waiting;  // at a warp's collective
    unsigned exited;
};

Fiber host;  // who called launch()
Fiber* running;
Fiber* previous;
std::vector<Lane> lanes;
std::vector<Warp> warps;
std::vector<unsigned> runnable;
unsigned waiting_in_block, exited_in_block;
const Lane* first_in_block;  // of the waiting
unsigned long long random_state, steps;
void** arguments;
std::string message;

unsigned draw(unsigned count) {  // xorshift64*
    random_state ^= random_state >> 12;
    random_state ^= random_state << 25;
    random_state ^= random_state >> 27;
    const unsigned bits = static_cast<unsigned>(random_state * 0x2545f4914f6cdd1dull >> 32);
    return static_cast<unsigned>(static_cast<unsigned long long>(bits) * count >> 32);
}

// --- fibers ---

void switched() {  // the first thing on the new stack
#ifdef EMULATE_ADDRESS
    __sanitizer_finish_switch_fiber(running->fake_stack, &previous->bottom, &previous->size);
#endif
}

void switch_to(Fiber& next) {
    previous = running;
    running = &next;
#ifdef EMULATE_ADDRESS
    void** save = previous->has_exited ? nullptr : &previous->fake_stack;
    __sanitizer_start_switch_fiber(save, next.bottom, next.size);
#endif
#ifdef EMULATE_THREAD
    __tsan_switch_to_fiber(next.tsan, NO_ORDER);
#endif
    Stack::change(previous->stack, next.stack);
    switched();
}

Lane& own() { return static_cast<Lane&>(*running); }

// --- errors ---

std::string text(const char* format, auto... values) {
    char buffer[256];
    snprintf(buffer, sizeof buffer, format, values...);
    return buffer;
}

std::string place(const Site& site) { return text("%s:%u", site.file_name(), site.line()); }

std::string call(const Lane& lane) {
    const std::string word = lane.word;
    return (lane.kind == SYNC_BLOCK ? word + "()" : word + text("(mask %08x)", lane.mask)) +
           " at " + place(lane.site);
}

std::string name(const Lane& lane) {
    return text("block (%u, %u, %u) thread (%u, %u, %u), lane %u of warp %u", block.x, block.y,
                block.z, lane.index.x, lane.index.y, lane.index.z, lane.number % 32,
                lane.number / 32);
}

// End the launch. Never comes back: this fiber is not run again.
[[noreturn]] void fail(const std::string& what) {
    message = what;
    switch_to(host);
    __builtin_unreachable();
}

[[noreturn]] void fail(const Lane& lane, const std::string& what) {
    fail(place(lane.site) + ": " + name(lane) + ": " + lane.word + " " + what);
}

int lowest(unsigned bits) { return __builtin_ctz(bits); }

// "lanes 0-3,8 of warp 1"
std::string name(unsigned bits, size_t warp) {
    std::string list;
    for (int first = 0; first < 32; first++) {
        if (!(bits >> first & 1)) continue;
        int last = first;
        while (last < 31 && bits >> (last + 1) & 1) last++;
        list += (list.empty() ? "" : ",") + std::to_string(first);
        if (last > first) list += "-" + std::to_string(last);
        first = last;
    }
    return "lanes " + list + " of warp " + std::to_string(warp);
}

bool is_same(const char* a, const char* b) { return a == b || !strcmp(a, b); }

bool is_together(const Lane& a, const Lane& b) {
    return a.mask == b.mask && is_same(a.word, b.word) && a.site.line() == b.site.line() &&
           a.site.column() == b.site.column() && is_same(a.site.file_name(), b.site.file_name());
}

[[noreturn]] void fail_deadlock() {
    std::string waiting;
    for (size_t w = 0; w < warps.size(); w++) {
        unsigned left = warps[w].present & ~warps[w].exited;
        while (left) {
            const Lane& lane = lanes[w * 32 + lowest(left)];
            unsigned together = 0;
            for (unsigned bits = left; bits; bits &= bits - 1) {
                const Lane& other = lanes[w * 32 + lowest(bits)];
                if (is_together(lane, other)) together |= other.bit();
            }
            waiting += "; " + name(together, w) + " wait in " + call(lane);
            left &= ~together;
        }
    }
    fail(text("block (%u, %u, %u): ", block.x, block.y, block.z) + "deadlock, no lane can run" +
         waiting);
}

// --- the schedule ---

void run_next() {
    if (runnable.empty()) {
        if (exited_in_block == lanes.size()) switch_to(host);
        fail_deadlock();
    }
    const unsigned i = draw(static_cast<unsigned>(runnable.size()));
    Lane& next = lanes[runnable[i]];
    runnable[i] = runnable.back();
    runnable.pop_back();
    thread = &next.index;
    if (&next != running) switch_to(next);
}

// The lanes of `meeting` have all arrived.
std::vector<Lane*> meeting;

// What they did before happens before whatever they do from here. Their barrier is known by an
// address that no other block uses: else blocks would be ordered too.
void order_meeting() {
#ifdef EMULATE_THREAD
    void* barrier = const_cast<void*>(meeting[0]->bottom);
    for (auto act : {__tsan_release, __tsan_acquire})
        for (Lane* lane : meeting) {
            __tsan_switch_to_fiber(lane->tsan, NO_ORDER);
            act(barrier);
        }
    __tsan_switch_to_fiber(running->tsan, NO_ORDER);
#endif
}

void release_meeting() {
    for (const Lane* lane : meeting) runnable.push_back(lane->number);
}

Bits result_of(const Lane& lane, const Lane* warp_lanes) {
    if (lane.kind == SHUFFLE) return warp_lanes[lane.source].value;
    Bits bits = 0;
    for (const Lane* other : meeting)
        if (lane.kind == BALLOT ? other->value != 0 : other->value == lane.value)
            bits |= other->bit();
    return bits;
}

// Lanes whose masks name each other wait for each other, so in the same collective. (One that does
// not name another may be waited for until it is done elsewhere.)
void check_together(const Lane& lane, const Lane& other) {
    if (other.mask & lane.bit() && !is_together(lane, other))
        fail(lane, text("(mask %08x) meets ", lane.mask) + name(other.bit(), other.number / 32) +
                       " in another collective: " + call(other));
}

void arrive_in_warp(Lane& lane) {
    const size_t w = lane.number / 32;
    Warp& warp = warps[w];
    const unsigned mask = lane.mask;
    if (!(mask & lane.bit())) fail(lane, text("with mask %08x, which lacks the caller", mask));
    if (const unsigned absent = mask & ~warp.present)
        fail(lane, text("with mask %08x, but the block lacks ", mask) + name(absent, w));
    if (const unsigned gone = mask & warp.exited)
        fail(lane, text("with mask %08x, but ", mask) + name(gone, w) + " exited");
    if (lane.kind == SHUFFLE && !(mask >> lane.source & 1))
        fail(lane, text("reads lane %d, which mask %08x lacks", lane.source, mask));
    Lane* const warp_lanes = &lanes[w * 32];
    if (const unsigned there = warp.waiting & mask) check_together(lane, warp_lanes[lowest(there)]);
    warp.waiting |= lane.bit();
    if ((warp.waiting & mask) != mask) return;

    meeting.clear();
    for (unsigned bits = mask; bits; bits &= bits - 1) {
        meeting.push_back(&warp_lanes[lowest(bits)]);
        check_together(lane, *meeting.back());
        if (!is_together(lane, *meeting.back())) return;  // not yet
    }
    if (lane.kind == SYNC_WARP) {
        order_meeting();
    } else if (lane.kind == BALLOT) {
        const Bits bits = result_of(lane, warp_lanes);
        for (Lane* other : meeting) other->result = bits;
    } else {
        for (Lane* other : meeting) other->result = result_of(*other, warp_lanes);
    }
    warp.waiting &= ~mask;
    release_meeting();
}

void arrive_in_block(Lane& lane) {
    if (exited_in_block) fail(lane, text("is not reached by %u exited threads", exited_in_block));
    if (waiting_in_block++ == 0) first_in_block = &lane;
    if (!is_together(lane, *first_in_block))
        fail(lane, "meets another: " + call(*first_in_block));
    if (waiting_in_block < lanes.size()) return;

    meeting.clear();
    for (Lane& other : lanes) meeting.push_back(&other);
    waiting_in_block = 0;
    order_meeting();
    release_meeting();
}

void run_lane() {  // the bottom of every fiber
    switched();
    emulator_entry(arguments);
    Lane& lane = own();
    Warp& warp = warps[lane.number / 32];
    lane.has_exited = true;
    warp.exited |= lane.bit();
    exited_in_block++;
    for (unsigned bits = warp.waiting; bits; bits &= bits - 1) {
        const Lane& other = lanes[lane.number / 32 * 32 + lowest(bits)];
        if (other.mask & lane.bit())
            fail(other, text("with mask %08x, but ", other.mask) +
                            name(lane.bit(), lane.number / 32) + " exited");
    }
    if (waiting_in_block)
        fail(*first_in_block, text("is not reached by thread %u, which exited", lane.number));
#ifdef EMULATE_THREAD
    __tsan_release(&host);
#endif
    run_next();
    __builtin_unreachable();
}

// --- memory ---

// Memory between two pages that must not be touched.
struct Pages {
    unsigned char* begin = nullptr;
    size_t size = 0;

    void map(size_t bytes) {
        size = (bytes + PAGE - 1) / PAGE * PAGE;
        void* all = mmap(nullptr, size + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (all == MAP_FAILED) throw std::bad_alloc();
        begin = static_cast<unsigned char*>(all) + PAGE;
        mprotect(begin, size, PROT_READ | PROT_WRITE);
    }
    ~Pages() {
        if (begin) munmap(begin - PAGE, size + 2 * PAGE);
    }
};

struct Memory {
    std::vector<Pages> stacks;
    Pages pages;

    Memory(size_t lane_count, size_t shared_bytes) : stacks(lane_count) {
        for (Pages& stack : stacks) stack.map(STACK_BYTES);
        pages.map(shared_bytes);  // which end with the pages, or less than 16 bytes before
        shared = pages.begin + pages.size - (shared_bytes + 15) / 16 * 16;
#ifdef EMULATE_ADDRESS
        __asan_poison_memory_region(pages.begin - PAGE, pages.size + 2 * PAGE);
        __asan_unpoison_memory_region(shared, shared_bytes);
#endif
    }
#ifdef EMULATE_ADDRESS
    ~Memory() { __asan_unpoison_memory_region(pages.begin - PAGE, pages.size + 2 * PAGE); }
#endif
};

// --- blocks ---

void start_lanes(const Memory& memory) {
    for (unsigned i = 0; i < lanes.size(); i++) {
        Lane& lane = lanes[i];
        const Pages& pages = memory.stacks[i];
        lane = {};
        lane.number = i;
        const unsigned row = i / block_size.x;
        lane.index = {i % block_size.x, row % block_size.y, row / block_size.y};
        lane.bottom = pages.begin;
        lane.size = pages.size - i % 16 * 256;  // staggered: not all in the same lines of a cache
        lane.stack.start(pages.begin, lane.size, run_lane);
#ifdef EMULATE_ADDRESS
        __asan_unpoison_memory_region(pages.begin, pages.size);  // frames of an earlier block
#endif
#ifdef EMULATE_THREAD
        lane.tsan = __tsan_create_fiber(0);
#endif
    }
}

void run_block(unsigned number, const Memory& memory, size_t shared_bytes) {
    const unsigned row = number / grid_size.x;
    block = {number % grid_size.x, row % grid_size.y, row / grid_size.y};
    waiting_in_block = exited_in_block = 0;
    runnable.clear();
    for (unsigned i = 0; i < lanes.size(); i++) runnable.push_back(i);
    for (size_t w = 0; w < warps.size(); w++) {
        const size_t present = std::min<size_t>(lanes.size() - w * 32, 32);
        warps[w] = {present == 32 ? ~0u : (1u << present) - 1, 0, 0};
    }
    memset(shared, POISON, shared_bytes);
    start_lanes(memory);
    run_next();
#ifdef EMULATE_THREAD
    for (const Lane& lane : lanes) __tsan_destroy_fiber(lane.tsan);
#endif
}

// --- faults that no sanitizer is there to explain ---

sigjmp_buf rescue;
pthread_t launching;

void rescue_launch(int signal, siginfo_t*, void*) {
    if (!pthread_equal(pthread_self(), launching)) {
        if (signal == SIGVTALRM) pthread_kill(launching, signal);
        else ::signal(signal, SIG_DFL);  // not ours: happens again, and ends the process
        return;
    }
    siglongjmp(rescue, signal);
}

// While it lives, a fault of a lane and the end of its time come back to `rescue`.
struct Rescue {
    static constexpr int SIGNALS[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGVTALRM};
    struct sigaction before[std::size(SIGNALS)];
    stack_t stack_before;
    unsigned char stack[65536];

    explicit Rescue(unsigned limit_s) {
        launching = pthread_self();
        stack_t alternate = {};
        alternate.ss_sp = stack;
        alternate.ss_size = sizeof stack;
        sigaltstack(&alternate, &stack_before);
        struct sigaction action = {};
        action.sa_sigaction = rescue_launch;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART;
        for (size_t i = 0; i < std::size(SIGNALS); i++) sigaction(SIGNALS[i], &action, &before[i]);
        set_timer(limit_s);
    }
    ~Rescue() {
        set_timer(0);
        for (size_t i = 0; i < std::size(SIGNALS); i++)
            sigaction(SIGNALS[i], &before[i], nullptr);
        sigaltstack(&stack_before, nullptr);
    }
    static void set_timer(unsigned seconds) {
        itimerval timer = {{0, 0}, {static_cast<time_t>(seconds), 0}};
        setitimer(ITIMER_VIRTUAL, &timer, nullptr);
    }
};

std::string explain(int signal) {
    const Lane& lane = own();
    const char* fault = signal == SIGVTALRM ? "no end within the time limit"
                        : signal == SIGFPE  ? "division by zero"
                        : signal == SIGILL  ? "illegal instruction"
                                            : "memory that is not there, or misaligned";
    return name(lane) + ": " + fault + (lane.word ? ", after " + call(lane) : "");
}

}  // namespace

Bits meet(Kind kind, const char* word, unsigned mask, Bits value, int source, Site site) {
    Lane& lane = own();
    steps++;
    lane.kind = kind;
    lane.word = word;
    lane.mask = mask;
    lane.value = value;
    lane.source = source;
    lane.site = site;
    if (kind == SYNC_BLOCK) arrive_in_block(lane);
    else arrive_in_warp(lane);
    run_next();
    return lane.result;
}

void trap(Site site) {
    Lane& lane = own();
    lane.word = "__trap";
    lane.site = site;
    fail(lane, "was called");
}

// Run every block; `message` stays empty when all went well.
void run_grid(size_t shared_bytes, unsigned limit_s) {
    std::vector<unsigned> blocks(grid_size.x * grid_size.y * grid_size.z);
    std::iota(blocks.begin(), blocks.end(), 0u);
    for (unsigned left = blocks.size(); left > 1; left--)
        std::swap(blocks[left - 1], blocks[draw(left)]);
    lanes.resize(block_size.x * block_size.y * block_size.z);
    warps.resize((lanes.size() + 31) / 32);
    runnable.reserve(lanes.size());  // here, because a lane that allocates would seem to race
    meeting.reserve(lanes.size());
#ifdef EMULATE_THREAD
    host.tsan = __tsan_get_current_fiber();
#else
    const Memory memory(lanes.size(), shared_bytes);
#endif
#if !defined(EMULATE_ADDRESS) && !defined(EMULATE_THREAD)
    const Rescue rescued(limit_s);
    if (const int signal = sigsetjmp(rescue, 1)) {
        message = explain(signal);
        return;
    }
#endif
    for (size_t i = 0; i < blocks.size() && message.empty(); i++) {
#ifdef EMULATE_THREAD
        const Memory memory(lanes.size(), shared_bytes);  // anew, or blocks would seem to race
#endif
        run_block(blocks[i], memory, shared_bytes);
    }
#ifdef EMULATE_THREAD
    __tsan_acquire(&host);  // the end of a launch happens after all of its lanes
#endif
}

}  // namespace emulator

// Launch the kernel; `sizes` are those of the grid and of a block. Returns what went wrong, or "".
extern "C" const char* emulator_launch(const unsigned* sizes, void** arguments, size_t shared_bytes,
                                       unsigned long long seed, unsigned limit_s,
                                       unsigned long long* steps) {
    using namespace emulator;
    grid_size = {sizes[0], sizes[1], sizes[2]};
    block_size = {sizes[3], sizes[4], sizes[5]};
    random_state = (seed + 1) * 0x9e3779b97f4a7c15ull | 1;
    emulator::arguments = arguments;
    emulator::steps = 0;
    running = &host;
    message.clear();
    try {
        run_grid(shared_bytes, limit_s);
    } catch (const std::bad_alloc&) {
        message = "the emulator is out of memory";
    }
    *steps = emulator::steps;
    return message.c_str();
}

