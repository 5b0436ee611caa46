// The scheduler behind host.h. Threads of a block run one after another as plain calls. A thread that reaches a closed
// barrier keeps its stack (a fiber), and the turn goes to a thread that can run: first to one whose barrier has opened,
// then to one that has not started. So a kernel without barriers never changes stacks. When all threads of a block have
// returned, the same fiber goes on with the next block. All of this is one `State`. Several threads of the host run blocks
// of one launch at the same time, each with a state of its own.
#define EMULATED_SCHEDULER 1
#include "host.h"
#include <stdio.h>
#include <sys/mman.h>
#ifndef __x86_64__
#include <setjmp.h>
#include <ucontext.h>
#endif

namespace emulated {
// ---- changing stacks ----

static void fiber_main();
#ifdef __x86_64__
// The registers that a call keeps are on the stack that is left, and its pointer is all that has to be remembered.
struct Context { void* stack; };
extern "C" __attribute__((visibility("hidden"))) void emulated_change(void** from, void* to) __asm__("emulated_change");
__asm__(".text\n.p2align 4\nemulated_change:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp, (%rdi)\nmovq %rsi, %rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n");
// A stack whose first change to it calls fiber_main.
static void prepare(Context& c, char* stack, size_t bytes) {
    void** top = (void**)(stack + bytes / 16 * 16);
    *--top = nullptr;
    *--top = (void*)fiber_main;
    for (int i = 0; i < 6; i++) *--top = nullptr;
    c.stack = top;
}
static void change(Context& from, Context& to) { emulated_change(&from.stack, to.stack); }
#else
// ucontext alone would call the system at every change.
struct Context { jmp_buf at; char* stack; size_t bytes; };
static void prepare(Context& c, char* stack, size_t bytes) { c.stack = stack; c.bytes = bytes; }
static void change(Context& from, Context& to) {
    if (_setjmp(from.at)) return;
    if (!to.stack) _longjmp(to.at, 1);
    ucontext_t c;
    getcontext(&c);
    c.uc_stack.ss_sp = to.stack; c.uc_stack.ss_size = to.bytes; c.uc_link = nullptr;
    to.stack = nullptr;
    makecontext(&c, fiber_main, 0);
    setcontext(&c);
    __builtin_trap();
}
#endif

// ---- the scheduler ----

constexpr unsigned MOST = 1024;
constexpr size_t STACK = REGION / MOST, PAGE = 16 << 10;


struct Fiber { Context context; Thread* thread; bool made; };
// What a launch reports: 0 if all is well; else the block and thread that failed, and why.
struct Fault { unsigned failed, block[3], thread; char text[244]; };
struct State : Here {
    Thread threads[MOST];
    Warp warps[MOST / 32];
    Thread* waiters[MOST];
    // Threads that can go on, as a ring; in shuffled order also those that have not started.
    Thread* ready[MOST];
    unsigned head, ready_count, started, done;
    Fiber fibers[MOST];
    Fiber* idle[MOST];
    unsigned idle_count;
    char* stacks;
    Context caller;
    void (*kernel)(const void*);
    const void* arguments;
    uint64_t next_block, last_block;
    // The seed of shuffled order, or 0; warps that are held back, and for how many more turns.
    uint64_t seed, random;
    unsigned held, turns;
    Fault* fault;
    State* next;
};
Entry* kernels;

static State& state() { return *static_cast<State*>(here()); }

// Zeroed memory for the life of the process, taken from the system as it is touched.
static void* reserve(size_t bytes) {
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON | MAP_NORESERVE, -1, 0);
    return p == MAP_FAILED ? nullptr : p;
}

static void all_idle(State& s) {
    s.idle_count = 0;
    for (unsigned i = MOST; i--;) s.idle[s.idle_count++] = &s.fibers[i];
}

// States that nobody uses. There are as many as runs that ever happened at one time: a state outlives the thread of the host
// that has used it, so that short-lived threads leave nothing behind.
static State* unused;
static bool locked;
static void lock() { while (__atomic_test_and_set(&locked, __ATOMIC_ACQUIRE)) {} }
static void unlock() { __atomic_clear(&locked, __ATOMIC_RELEASE); }

static State* take() {
    lock();
    State* s = unused;
    if (s) unused = s->next;
    unlock();
    if (s) return s;
    s = (State*)reserve(sizeof(State));
    char* stacks = (char*)reserve(2 * REGION);
    if (!s || !stacks) return nullptr;
    for (unsigned t = 0; t < MOST; t++) s->threads[t] = Thread{{t, 0, 0}, t & 31, &s->warps[t >> 5], nullptr};
    s->stacks = (char*)(((uintptr_t)stacks + REGION - 1) / REGION * REGION);
    *(Here**)(s->stacks + REGION - sizeof(Here*)) = s;
    all_idle(*s);
    return s;
}

static void give_back(State* s) {
    lock();
    s->next = unused;
    unused = s;
    unlock();
}

static void push(State& s, Thread* t) { s.ready[(s.head + s.ready_count++) % MOST] = t; }

static uint64_t next_random(State& s) {
    s.random = s.random * 6364136223846793005ull + 1442695040888963407ull;
    return s.random >> 33;
}

static void open(State& s, Barrier& b) {
    for (unsigned i = 0; i < b.waiting; i++) push(s, b.waiters[i]);
    b.waiting = 0;
    b.opened++;
}

// A thread that has returned no longer counts at barriers.
static void leave(State& s, Barrier& b) {
    b.alive--;
    if (b.waiting && b.waiting == b.alive) open(s, b);
}

// The next block of this run; false if there is none.
static bool next_block(State& s) {
    if (s.next_block == s.last_block) return false;
    const uint64_t index = s.next_block++, plane = (uint64_t)s.grid_dim.x * s.grid_dim.y;
    s.block_index = {(unsigned)(index % s.grid_dim.x), (unsigned)(index % plane / s.grid_dim.x), (unsigned)(index / plane)};
    const unsigned n = s.block_dim.x;
    s.block = Barrier{0, n, 0, 0, s.waiters};
    for (unsigned w = 0; 32 * w < n; w++) s.warps[w].barrier = Barrier{0, n - 32 * w < 32 ? n - 32 * w : 32, 0, 0, s.warps[w].waiters};
    s.head = s.ready_count = s.started = s.done = s.held = s.turns = 0;
    if (s.seed) {
        s.random = s.seed ^ (index + 1) * 0x9E3779B97F4A7C15ull;
        for (unsigned t = 0; t < n; t++) push(s, &s.threads[t]);
    }
    return true;
}

// A random thread that can run. Whole warps are held back for a random number of turns, which exposes missing barriers.
static Thread* choose_any(State& s) {
    if (!s.ready_count) return nullptr;
    if (s.turns-- == 0) {
        s.held = (unsigned)(next_random(s) ^ next_random(s) << 16);
        s.turns = next_random(s) & 127;
    }
    const unsigned from = (unsigned)(next_random(s) % s.ready_count);
    unsigned at = from;
    for (unsigned i = 0; i < s.ready_count; i++) {
        unsigned candidate = (from + i) % s.ready_count;
        if (!(s.held >> (s.ready[candidate]->index.x >> 5) & 1)) { at = candidate; break; }
    }
    Thread* t = s.ready[at];
    s.ready[at] = s.ready[--s.ready_count];
    return t;
}

static Thread* choose(State& s) {
    if (s.seed) return choose_any(s);
    if (s.ready_count) {
        Thread* t = s.ready[s.head];
        s.head = (s.head + 1) % MOST;
        s.ready_count--;
        return t;
    }
    return s.started < s.block_dim.x ? &s.threads[s.started++] : nullptr;
}

void fail(const char* what, const char* file, unsigned line) {
    State& s = state();
    Fault& f = *s.fault;
    f.failed = 1;
    f.block[0] = s.block_index.x; f.block[1] = s.block_index.y; f.block[2] = s.block_index.z;
    f.thread = s.current->index.x;
    if (line) snprintf(f.text, sizeof f.text, "%s (%s line %u)", what, file, line);
    else snprintf(f.text, sizeof f.text, "%s", what);
    // The fibers that hang on old stacks begin again.
    for (Fiber& fiber : s.fibers) fiber.made = false;
    for (Thread& t : s.threads) t.fiber = nullptr;
    all_idle(s);
    Context left;
    change(left, s.caller);
    __builtin_trap();
}

static void deadlock() { fail("some of its threads wait at a barrier that others never reach", "", 0); }

// The fiber of a thread that is about to run.
static Fiber* fiber_of(State& s, Thread* t) {
    if (t->fiber) return t->fiber;
    Fiber* f = t->fiber = s.idle[--s.idle_count];
    f->thread = t;
    if (!f->made) {
        f->made = true;
        char* stack = s.stacks + (size_t)(f - s.fibers) * STACK;
        mprotect(stack, PAGE, PROT_NONE);  // A stack that is too deep ends the process, and does not reach its neighbour.
        // Stacks end at different distances from a page's end, so that they do not compete for the same cache lines.
        prepare(f->context, stack, STACK - 64 - 320 * ((f - s.fibers) % 61));
    }
    return f;
}

void wait(Barrier& b) {
    State& s = state();
    Thread* me = s.current;
    if (b.waiting + 1 == b.alive) {
        open(s, b);
        if (!s.seed) return;  // Whoever opens a barrier goes on. In shuffled order it is one among those that may.
        push(s, me);
    } else {
        b.waiters[b.waiting++] = me;
    }
    Thread* t = choose(s);
    if (!t) deadlock();
    if (t == me) return;
    s.current = t;
    change(me->fiber->context, fiber_of(s, t)->context);
}

// Runs threads as long as there are new ones, then gives its turn away and waits to be used again.
static void fiber_main() {
    State* s = &state();
    Fiber* f = s->current->fiber;
    for (;;) {
        Thread* t = f->thread;
        bool finished = false;
        for (;;) {
            s->current = t;
            s->kernel(s->arguments);
            t->fiber = nullptr;
            s->done++;
            leave(*s, t->warp->barrier);
            leave(*s, s->block);
            if (s->done == s->block_dim.x && !next_block(*s)) { finished = true; break; }
            t = choose(*s);
            if (!t) deadlock();
            if (t->fiber) break;
            t->fiber = f;
            f->thread = t;
        }
        s->idle[s->idle_count++] = f;
        if (!finished) s->current = t;
        change(f->context, finished ? s->caller : t->fiber->context);
    }
}
}

#define EXPORT extern "C" __attribute__((visibility("default")))

// The kernel of that name, or null; `bytes` of its arguments and `threads` of its blocks.
EXPORT const void* emulated_find(const char* name, size_t* bytes, unsigned* threads) {
    for (auto e = emulated::kernels; e; e = e->next) if (!strcmp(e->name, name)) { *bytes = e->bytes; *threads = e->threads; return e; }
    return nullptr;
}

// Runs the blocks first..last of a grid, counted along x, then y, then z. A seed other than 0 shuffles the threads.
EXPORT void emulated_run(const void* kernel, const unsigned* grid, uint64_t first, uint64_t last, const void* arguments, uint64_t seed, emulated::Fault* fault) {
    using namespace emulated;
    fault->failed = 0;
    if (first == last) return;
    State* own = take();
    if (!own) {
        fault->failed = 1;
        snprintf(fault->text, sizeof fault->text, "no memory for the stacks of its threads");
        return;
    }
    State& s = *own;
    auto entry = (const Entry*)kernel;
    s.kernel = entry->run;
    s.arguments = arguments;
    s.block_dim = {entry->threads, 1, 1};
    s.grid_dim = {grid[0], grid[1], grid[2]};
    s.next_block = first; s.last_block = last;
    s.seed = seed; s.fault = fault;
    next_block(s);
    s.current = choose(s);
    change(s.caller, fiber_of(s, s.current)->context);
    give_back(own);
}

// ---- what the compiler's checks call (-fsanitize with handlers of our own, so that no runtime of theirs is needed) ----

namespace { struct Where { const char* file; unsigned line, column; }; }
EXPORT void __ubsan_handle_type_mismatch_v1(const Where* w, uintptr_t address) {
    emulated::fail(address ? "an access at an address that is no multiple of its size" : "an access through a null pointer", w->file, w->line);
}
EXPORT void __ubsan_handle_out_of_bounds(const Where* w, uintptr_t) { emulated::fail("an index outside of its array", w->file, w->line); }
EXPORT void __ubsan_handle_shift_out_of_bounds(const Where* w, uintptr_t, uintptr_t) { emulated::fail("a shift by 32 bits or more", w->file, w->line); }
EXPORT void __ubsan_handle_divrem_overflow(const Where* w, uintptr_t, uintptr_t) { emulated::fail("a division by zero", w->file, w->line); }
