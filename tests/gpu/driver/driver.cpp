// A stand-in for the NVIDIA driver, NVRTC and cuBLAS, so that the code that talks to them runs on a machine without a card: the
// functions that fourfold calls, over memory of the host and over the kernels that the emulated machine has compiled. One text,
// compiled three times.
//
// Nothing happens when it is issued, and everything as late as the rules allow: a stream runs when somebody waits for it, and another
// stream as far as an event asks for it. With FOURFOLD_STAND_IN_MODE=early, streams beside the first one run at once. So work whose
// order nobody has asked for is done in another order than it was meant, and finds NaN: fresh memory and memory that was given back
// hold it. A context that is not bound, a handle that is not alive, an address outside of what was allocated and arguments that are
// not a kernel's are errors of the call, or of the next one that waits.
//
// At its end a process says how many streams, events and graphs there were at one time, and how many kernels it has run.
#include <dlfcn.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))

// What the driver's library gives the others.
using Enqueue = int (*)(void* stream, void (*work)(void*), void* data);
using Inside = int (*)(uint64_t address, size_t bytes);

#ifdef OF_DRIVER

namespace {

enum { OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_CONTEXT = 201, INVALID_HANDLE = 400, NOT_FOUND = 500, ILLEGAL_ADDRESS = 700 };

struct Stream;
// An event is where a stream was when it was recorded.
struct Event { Stream* stream = nullptr; uint64_t place = 0; bool timed = false; };
struct Stream { std::deque<std::function<void()>> work; uint64_t issued = 0, done = 0; bool is_first = false; };
struct Kernel { const void* entry; size_t bytes; unsigned threads; std::string name; };
struct Node { Kernel* kernel; unsigned grid[3]; std::vector<char> arguments; };
struct Graph { std::vector<std::unique_ptr<Node>> nodes; };
struct Fault { unsigned failed, block[3], thread; char text[244]; };

std::recursive_mutex turn;
thread_local bool bound = false;
int contexts = 0, sticky = OK;
bool is_early = false, is_loud = false;
size_t total = size_t(8) << 30, live = 0;
// Pieces of pinned memory of 4 MiB or more that the host still gives.
long pinned_left = 1 << 30;
std::map<uint64_t, size_t> memory, pinned;
std::set<Stream*> streams;
std::set<Event*> events;
std::set<Graph*> graphs;
std::set<std::shared_ptr<Graph>*> executables;
std::map<std::string, std::unique_ptr<Kernel>> kernels;
const void* (*find)(const char*, size_t*, unsigned*) = nullptr;
void (*run)(const void*, const unsigned*, uint64_t, uint64_t, const void*, uint64_t, Fault*) = nullptr;

void tell(const char* what, const char* more = "") { fprintf(stderr, "stand-in driver: %s%s\n", what, more); }

bool is_inside(uint64_t address, size_t bytes) {
    auto after = memory.upper_bound(address);
    if (after == memory.begin()) return false;
    auto block = std::prev(after);
    return address + bytes <= block->first + block->second;
}

void fault(const std::string& what) {
    if (sticky == OK) tell(what.c_str());
    sticky = ILLEGAL_ADDRESS;
}

void run_until(Stream* s, uint64_t place) {
    while (s->done < place && !s->work.empty()) {
        auto work = std::move(s->work.front());
        s->work.pop_front();
        work();
        s->done++;
    }
}

int issue(Stream* s, std::function<void()> work) {
    if (!streams.count(s)) return INVALID_HANDLE;
    s->work.push_back(std::move(work));
    s->issued++;
    if (is_early && !s->is_first) run_until(s, s->issued);
    return sticky;
}

// Every call takes its turn and needs a context.
#define ENTER                                            \
    std::lock_guard<std::recursive_mutex> guard(turn);   \
    if (!bound) return INVALID_CONTEXT
#define STREAM(s) \
    Stream* stream = (Stream*)(s); \
    if (!streams.count(stream)) return INVALID_HANDLE
#define EVENT(e) \
    Event* event = (Event*)(e); \
    if (!events.count(event)) return INVALID_HANDLE

// What there was at most. A process keeps its devices to its end.
struct Most {
    size_t streams = 0, events = 0, graphs = 0, kernels = 0;
    ~Most() {
        if (is_loud) fprintf(stderr, "stand-in driver: at most %zu streams, %zu events and %zu graphs, %zu kernels\n", streams, events, graphs, kernels);
    }
} most;
size_t greater(size_t a, size_t b) { return a > b ? a : b; }

void launch(Stream* stream, Kernel* kernel, const unsigned* grid, std::vector<char> arguments) {
    unsigned x = grid[0], y = grid[1], z = grid[2];
    issue(stream, [=] {
        if (sticky != OK) return;
        unsigned grid[3] = {x, y, z};
        Fault f;
        run(kernel->entry, grid, 0, (uint64_t)x * y * z, arguments.data(), 0, &f);
        most.kernels++;
        if (f.failed) fault("kernel " + kernel->name + ": " + f.text);
    });
}

}  // namespace

EXPORT int stand_in_enqueue(void* s, void (*work)(void*), void* data) {
    ENTER;
    STREAM(s);
    return issue(stream, [=] { work(data); });
}
EXPORT int stand_in_inside(uint64_t address, size_t bytes) {
    std::lock_guard<std::recursive_mutex> guard(turn);
    if (is_inside(address, bytes)) return 1;
    fault("an operand of a product lies outside of what was allocated");
    return 0;
}

EXPORT int cuInit(unsigned) {
    const char* mode = getenv("FOURFOLD_STAND_IN_MODE");
    is_early = mode && !strcmp(mode, "early");
    if (const char* pieces = getenv("FOURFOLD_STAND_IN_PINNED")) pinned_left = atol(pieces);
    if (const char* bytes = getenv("FOURFOLD_STAND_IN_MEMORY")) total = strtoull(bytes, nullptr, 10);
    return OK;
}
EXPORT int cuDriverGetVersion(int* v) { *v = 13000; return OK; }
EXPORT int cuDeviceGetCount(int* n) { *n = 1; return OK; }
EXPORT int cuDeviceGet(int* device, int ordinal) { *device = ordinal; return ordinal ? INVALID_VALUE : OK; }
EXPORT int cuDeviceGetName(char* name, int len, int) { snprintf(name, len, "stand-in"); return OK; }
EXPORT int cuDeviceGetAttribute(int* v, int which, int) {
    if (which != 75 && which != 76) return INVALID_VALUE;  // The compute capability: 9.0.
    *v = which == 75 ? 9 : 0;
    return OK;
}
EXPORT int cuGetErrorName(int error, const char** text) {
    *text = error == OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : error == INVALID_CONTEXT ? "CUDA_ERROR_INVALID_CONTEXT" :
        error == INVALID_HANDLE ? "CUDA_ERROR_INVALID_HANDLE" : error == ILLEGAL_ADDRESS ? "CUDA_ERROR_ILLEGAL_ADDRESS" : "CUDA_ERROR";
    return OK;
}
EXPORT int cuGetErrorString(int error, const char** text) { return cuGetErrorName(error, text); }

EXPORT int cuDevicePrimaryCtxRetain(void** context, int) {
    std::lock_guard<std::recursive_mutex> guard(turn);
    contexts++;
    is_loud = true;
    *context = &contexts;
    return OK;
}
EXPORT int cuDevicePrimaryCtxRelease_v2(int) {
    std::lock_guard<std::recursive_mutex> guard(turn);
    contexts--;
    return OK;
}
EXPORT int cuCtxSetCurrent(void* context) { bound = context == &contexts && contexts > 0; return bound ? OK : INVALID_CONTEXT; }

EXPORT int cuModuleLoadData(void** module, const void* image) {
    ENTER;
    if (strncmp((const char*)image, "stand-in", 8)) return INVALID_VALUE;
    const char* file = getenv("FOURFOLD_STAND_IN_KERNELS");
    void* library = file ? dlopen(file, RTLD_NOW | RTLD_LOCAL) : nullptr;
    if (!library) { tell("no kernels: ", file ? dlerror() : "FOURFOLD_STAND_IN_KERNELS is not set"); return NOT_FOUND; }
    find = (decltype(find))dlsym(library, "emulated_find");
    run = (decltype(run))dlsym(library, "emulated_run");
    *module = strdup((const char*)image);
    return find && run ? OK : NOT_FOUND;
}
EXPORT int cuModuleUnload(void* module) { ENTER; free(module); return OK; }
EXPORT int cuModuleGetFunction(void** function, void* module, const char* name) {
    ENTER;
    // A part's text has its own kernels alone. The name is followed by a comma, in KERNEL(name, Arguments, threads) or in a macro's use.
    auto& kernel = kernels[name];
    if (!kernel) {
        size_t bytes;
        unsigned threads;
        const void* entry = find(name, &bytes, &threads);
        if (!entry) { kernels.erase(name); return NOT_FOUND; }
        kernel.reset(new Kernel{entry, bytes, threads, name});
    }
    *function = kernel.get();
    return module ? OK : INVALID_HANDLE;
}

EXPORT int cuStreamCreate(void** s, unsigned flags) {
    ENTER;
    if (flags != 1) { tell("a stream that waits for the default stream"); return INVALID_VALUE; }
    Stream* made = new Stream;
    made->is_first = streams.empty();
    streams.insert(made);
    most.streams = greater(most.streams, streams.size());
    *s = made;
    return OK;
}
EXPORT int cuStreamSynchronize(void* s) { ENTER; STREAM(s); run_until(stream, stream->issued); return sticky; }
EXPORT int cuStreamDestroy_v2(void* s) {
    ENTER;
    STREAM(s);
    if (stream->done < stream->issued) tell("a stream ends before its work");
    for (Event* e : events) if (e->stream == stream) e->stream = nullptr;
    streams.erase(stream);
    delete stream;
    return OK;
}
EXPORT int cuStreamWaitEvent(void* s, void* e, unsigned) {
    ENTER;
    STREAM(s);
    EVENT(e);
    // The record that is there now, whatever comes later.
    Stream* other = event->stream;
    uint64_t place = event->place;
    return issue(stream, [=] { if (other && streams.count(other)) run_until(other, place); });
}
EXPORT int cuEventCreate(void** e, unsigned flags) {
    ENTER;
    Event* made = new Event;
    made->timed = !(flags & 2);
    events.insert(made);
    most.events = greater(most.events, events.size());
    *e = made;
    return OK;
}
EXPORT int cuEventRecord(void* e, void* s) { ENTER; STREAM(s); EVENT(e); event->stream = stream; event->place = stream->issued; return sticky; }
EXPORT int cuEventSynchronize(void* e) { ENTER; EVENT(e); if (event->stream) run_until(event->stream, event->place); return sticky; }
EXPORT int cuEventElapsedTime(float* ms, void* from, void* to) {
    ENTER;
    if (!events.count((Event*)from) || !events.count((Event*)to) || !((Event*)from)->timed || !((Event*)to)->timed) return INVALID_HANDLE;
    *ms = 1;
    return OK;
}
EXPORT int cuEventElapsedTime_v2(float* ms, void* from, void* to) { return cuEventElapsedTime(ms, from, to); }
EXPORT int cuEventDestroy_v2(void* e) { ENTER; EVENT(e); events.erase(event); delete event; return OK; }

EXPORT int cuDeviceGetDefaultMemPool(void** pool, int) { *pool = &memory; return OK; }
EXPORT int cuMemPoolSetAttribute(void* pool, int, void*) { return pool == &memory ? OK : INVALID_HANDLE; }
EXPORT int cuMemPoolTrimTo(void* pool, size_t) { return pool == &memory ? OK : INVALID_HANDLE; }
EXPORT int cuMemGetInfo_v2(size_t* free_, size_t* total_) { ENTER; *free_ = total - live; *total_ = total; return OK; }
EXPORT int cuMemAllocAsync(uint64_t* address, size_t bytes, void* s) {
    ENTER;
    STREAM(s);
    if (live + bytes > total) return OUT_OF_MEMORY;
    void* p = aligned_alloc(256, (bytes + 255) / 256 * 256);
    if (!p) return OUT_OF_MEMORY;
    memset(p, 0xff, bytes);
    memory[(uint64_t)p] = bytes;
    live += bytes;
    *address = (uint64_t)p;
    // Until the stream is here, others may still use the same memory: what is written to it before is lost.
    return issue(stream, [=] { memset(p, 0xff, bytes); });
}
EXPORT int cuMemFreeAsync(uint64_t address, void* s) {
    ENTER;
    STREAM(s);
    if (!memory.count(address)) { tell("memory is given back that was not allocated"); return INVALID_VALUE; }
    return issue(stream, [=] {
        auto block = memory.find(address);
        if (block == memory.end()) return fault("memory is given back twice");
        memset((void*)address, 0xff, block->second);
        live -= block->second;
        memory.erase(block);
        free((void*)address);
    });
}
EXPORT int cuMemHostAlloc(void** p, size_t bytes, unsigned) { ENTER; if (bytes >= 4 << 20 && pinned_left-- <= 0) return OUT_OF_MEMORY; *p = malloc(bytes); pinned[(uint64_t)*p] = bytes; return *p ? OK : OUT_OF_MEMORY; }
EXPORT int cuMemFreeHost(void* p) {
    ENTER;
    if (!pinned.erase((uint64_t)p)) { tell("pinned memory is given back that was not allocated"); return INVALID_VALUE; }
    free(p);
    return OK;
}

static int copy(void* s, uint64_t to, uint64_t from, size_t bytes, bool to_device, bool from_device) {
    ENTER;
    STREAM(s);
    // Of pageable memory the driver copies while the caller waits.
    auto is_pinned = [=](uint64_t address) {
        auto after = pinned.upper_bound(address);
        return after != pinned.begin() && address + bytes <= std::prev(after)->first + std::prev(after)->second;
    };
    bool waits = (!to_device && !is_pinned(to)) || (!from_device && !is_pinned(from));
    int done = issue(stream, [=] {
        if (sticky != OK) return;
        if ((to_device && !is_inside(to, bytes)) || (from_device && !is_inside(from, bytes))) return fault("a copy outside of what was allocated");
        memcpy((void*)to, (void*)from, bytes);
    });
    if (waits) run_until(stream, stream->issued);
    return done ? done : sticky;
}
EXPORT int cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t bytes, void* s) { return copy(s, to, (uint64_t)from, bytes, true, false); }
EXPORT int cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t bytes, void* s) { return copy(s, (uint64_t)to, from, bytes, false, true); }
EXPORT int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, void* s) { return copy(s, to, from, bytes, true, true); }
EXPORT int cuMemsetD8Async(uint64_t to, unsigned char value, size_t bytes, void* s) {
    ENTER;
    STREAM(s);
    return issue(stream, [=] { if (is_inside(to, bytes)) memset((void*)to, value, bytes); else fault("memory is set outside of what was allocated"); });
}

static bool fits(const Kernel* kernel, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz, unsigned shared) {
    return x && y && z && y < 65536 && z < 65536 && bx == kernel->threads && by == 1 && bz == 1 && shared == 0;
}
EXPORT int cuLaunchKernel(void* f, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz, unsigned shared, void* s, void** arguments, void** extra) {
    ENTER;
    STREAM(s);
    Kernel* kernel = (Kernel*)f;
    if (!fits(kernel, x, y, z, bx, by, bz, shared) || extra) return INVALID_VALUE;
    const char* first = (const char*)arguments[0];
    unsigned grid[3] = {x, y, z};
    launch(stream, kernel, grid, std::vector<char>(first, first + kernel->bytes));
    return sticky;
}

struct NodeParams { Kernel* func; unsigned grid[3], block[3], shared; void** arguments; void** extra; void* kern; void* ctx; };
EXPORT int cuGraphCreate(void** g, unsigned) { ENTER; Graph* made = new Graph; graphs.insert(made); *g = made; return OK; }
EXPORT int cuGraphDestroy(void* g) { ENTER; if (!graphs.erase((Graph*)g)) return INVALID_HANDLE; delete (Graph*)g; return OK; }
EXPORT int cuGraphAddKernelNode_v2(void** node, void* g, void* const* after, size_t count, const NodeParams* p) {
    ENTER;
    Graph* graph = (Graph*)g;
    if (!graphs.count(graph)) return INVALID_HANDLE;
    // A chain: nodes that nothing orders would run at the same time.
    bool is_chained = graph->nodes.empty() ? count == 0 : count == 1 && *after == graph->nodes.back().get();
    if (!is_chained || !fits(p->func, p->grid[0], p->grid[1], p->grid[2], p->block[0], p->block[1], p->block[2], p->shared)) return INVALID_VALUE;
    const char* first = (const char*)p->arguments[0];
    graph->nodes.emplace_back(new Node{p->func, {p->grid[0], p->grid[1], p->grid[2]}, std::vector<char>(first, first + p->func->bytes)});
    *node = graph->nodes.back().get();
    return OK;
}
EXPORT int cuGraphInstantiateWithFlags(void** executable, void* g, unsigned long long) {
    ENTER;
    if (!graphs.count((Graph*)g)) return INVALID_HANDLE;
    auto whole = std::make_shared<Graph>();
    for (auto& node : ((Graph*)g)->nodes) whole->nodes.emplace_back(new Node(*node));
    auto* made = new std::shared_ptr<Graph>(whole);
    executables.insert(made);
    most.graphs = greater(most.graphs, executables.size());
    *executable = made;
    return OK;
}
EXPORT int cuGraphLaunch(void* executable, void* s) {
    ENTER;
    STREAM(s);
    auto* of = (std::shared_ptr<Graph>*)executable;
    if (!executables.count(of)) return INVALID_HANDLE;
    for (auto& node : (*of)->nodes) launch(stream, node->kernel, node->grid, node->arguments);
    return sticky;
}
EXPORT int cuGraphExecDestroy(void* executable) {
    ENTER;
    auto* of = (std::shared_ptr<Graph>*)executable;
    if (!executables.erase(of)) return INVALID_HANDLE;
    delete of;
    return OK;
}

#endif
#ifdef OF_NVRTC

EXPORT int nvrtcVersion(int* major, int* minor) { *major = 13; *minor = 0; return 0; }
EXPORT int nvrtcGetNumSupportedArchs(int* n) { *n = 2; return 0; }
EXPORT int nvrtcGetSupportedArchs(int* all) { all[0] = 75; all[1] = 90; return 0; }
EXPORT int nvrtcCreateProgram(void** program, const char* text, const char*, int, const char* const*, const char* const*) {
    *program = strdup(text);
    return 0;
}
EXPORT int nvrtcDestroyProgram(void** program) { free(*program); *program = nullptr; return 0; }
EXPORT int nvrtcCompileProgram(void*, int, const char* const*) { return 0; }
EXPORT int nvrtcGetProgramLogSize(void*, size_t* size) { *size = 1; return 0; }
EXPORT int nvrtcGetProgramLog(void*, char* log) { *log = 0; return 0; }
EXPORT int nvrtcGetCUBINSize(void*, size_t* size) { *size = 9; return 0; }
EXPORT int nvrtcGetCUBIN(void*, char* image) { memcpy(image, "stand-in", 9); return 0; }
EXPORT const char* nvrtcGetErrorString(int) { return "NVRTC_ERROR"; }

#endif
#ifdef OF_CUBLAS

namespace {

// CUDA_R_32F, CUDA_R_16F, CUDA_R_16BF.
enum { F32 = 0, F16 = 2, BF16 = 14 };

struct Operand { char* at; int type; int64_t row, next; bool transposed; };
struct Product { int m, n, k, batch; float alpha, beta; Operand x, w, y; Inside inside; };

float from_f16(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, e = h >> 10 & 31, f = h & 1023, bits;
    if (e == 31) bits = sign | 0x7f800000 | f << 13;
    else if (e) bits = sign | (e + 112) << 23 | f << 13;
    else { float v = ldexpf((float)f, -24); return sign ? -v : v; }
    float v;
    memcpy(&v, &bits, 4);
    return v;
}
uint16_t to_f16(float v) {
    uint32_t bits;
    memcpy(&bits, &v, 4);
    uint16_t sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return sign | 0x7e00;
    if (bits >= 0x477ff000) return sign | 0x7c00;  // What rounds to 65,536 or more.
    if (bits < 0x38800000) {                       // Below the least normal number: whole 2^-24.
        float a;
        memcpy(&a, &bits, 4);
        return sign | (uint16_t)nearbyintf(ldexpf(a, 24));
    }
    uint32_t half = bits - (112u << 23);
    return sign | (uint16_t)((half + 0xfff + (half >> 13 & 1)) >> 13);
}
float from_bf16(uint16_t h) { uint32_t bits = (uint32_t)h << 16; float v; memcpy(&v, &bits, 4); return v; }
uint16_t to_bf16(float v) {
    uint32_t bits;
    memcpy(&bits, &v, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return bits >> 16 | 0x40;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
size_t size_of(int type) { return type == F32 ? 4 : 2; }
float load(const Operand& o, int64_t at) {
    if (o.type == F32) return ((float*)o.at)[at];
    uint16_t h = ((uint16_t*)o.at)[at];
    return o.type == F16 ? from_f16(h) : from_bf16(h);
}
void store(const Operand& o, int64_t at, float v) {
    if (o.type == F32) ((float*)o.at)[at] = v;
    else ((uint16_t*)o.at)[at] = o.type == F16 ? to_f16(v) : to_bf16(v);
}
bool inside(const Product& p, const Operand& o, int rows, int cols) {
    int64_t last = (p.batch - 1) * o.next + (rows - 1) * o.row + cols;
    return p.inside((uint64_t)o.at, last * size_of(o.type));
}

// Sums in the order of k, one rounding at each step where the processor has it, as the emulated machine has them.
#ifdef __x86_64__
__attribute__((target("avx2,fma"), optimize("O3"))) void add_fused(float* sums, float v, const float* w, int n) {
    for (int j = 0; j < n; j++) sums[j] = __builtin_fmaf(v, w[j], sums[j]);
}
#endif
void add_plain(float* sums, float v, const float* w, int n) { for (int j = 0; j < n; j++) sums[j] += v * w[j]; }

void multiply(void* data) {
    std::unique_ptr<Product> product((Product*)data);
    const Product& p = *product;
    if (!inside(p, p.x, p.x.transposed ? p.k : p.m, p.x.transposed ? p.m : p.k)) return;
    if (!inside(p, p.w, p.w.transposed ? p.n : p.k, p.w.transposed ? p.k : p.n)) return;
    if (!inside(p, p.y, p.m, p.n)) return;
    // One whose speed is measured; nobody reads the numbers.
    if ((double)p.m * p.n * p.k > 4e9) return;
    auto add = add_plain;
#ifdef __x86_64__
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) add = add_fused;
#endif
    std::vector<float> w((size_t)p.k * p.n), sums(p.n);
    for (int b = 0; b < p.batch; b++) {
        for (int t = 0; t < p.k; t++)
            for (int j = 0; j < p.n; j++) w[(size_t)t * p.n + j] = load(p.w, b * p.w.next + (p.w.transposed ? j * p.w.row + t : t * p.w.row + j));
        for (int i = 0; i < p.m; i++) {
            for (float& sum : sums) sum = 0;
            for (int t = 0; t < p.k; t++) add(sums.data(), load(p.x, b * p.x.next + (p.x.transposed ? t * p.x.row + i : i * p.x.row + t)), &w[(size_t)t * p.n], p.n);
            for (int j = 0; j < p.n; j++) {
                int64_t at = b * p.y.next + i * p.y.row + j;
                store(p.y, at, p.alpha * sums[j] + (p.beta == 0 ? 0 : p.beta * load(p.y, at)));
            }
        }
    }
}

struct Handle { void* stream; };
Enqueue enqueue;
Inside is_inside;

}  // namespace

EXPORT int cublasCreate_v2(void** handle) {
    void* driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
    if (!driver) return 1;
    enqueue = (Enqueue)dlsym(driver, "stand_in_enqueue");
    is_inside = (Inside)dlsym(driver, "stand_in_inside");
    *handle = new Handle{nullptr};
    return enqueue && is_inside ? 0 : 1;
}
EXPORT int cublasDestroy_v2(void* handle) { delete (Handle*)handle; return 0; }
EXPORT int cublasSetStream_v2(void* handle, void* stream) { ((Handle*)handle)->stream = stream; return 0; }
EXPORT int cublasSetMathMode(void*, int) { return 0; }
EXPORT int cublasGetVersion_v2(void*, int* version) { *version = 130100; return 0; }
// Column-major: its second operand is the rows' x, its first w.
EXPORT int cublasGemmStridedBatchedEx(void* handle, int of_a, int of_b, int m, int n, int k, const void* alpha, const void* a, int type_a, int lda, long long next_a,
    const void* b, int type_b, int ldb, long long next_b, const void* beta, void* c, int type_c, int ldc, long long next_c, int batch, int, int) {
    auto* p = new Product{n, m, k, batch, *(const float*)alpha, *(const float*)beta, {(char*)b, type_b, ldb, next_b, of_b == 1}, {(char*)a, type_a, lda, next_a, of_a == 1},
        {(char*)c, type_c, ldc, next_c, false}, is_inside};
    return enqueue(((Handle*)handle)->stream, multiply, p) ? 13 : 0;
}

#endif
