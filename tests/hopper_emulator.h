// A Hopper GPU on the host, as far as the kernels of `ops/hopper` use it: what their CUDA C++ needs to be compiled by a
// C++ compiler, and a stand-in for each instruction that they write as assembly.
//
// Threads are fibers of one thread of the host. A cluster's blocks run together, one cluster after another. A fiber goes
// on until it waits: for its warp, for a barrier or for products. A seed decides in which order they go on, which warps
// sleep for a while, and when copies arrive, late and in any order. Products are computed as they are started or, where
// `late`, as late as a kernel allows; an operand in registers is read then too. Shared memory is NaN at first.
//
// `hopper_emulator.py` turns assembly into calls: of `asm("add %0, %1;" : "=r"(x) : "r"(y))` it makes `ptx_add(x, y)`.

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __cluster_dims__(...)
#define __launch_bounds__(...)
using std::max;
using std::min;

struct float2 { float x, y; };
struct uint2 { unsigned x, y; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
struct Index { unsigned x, y, z; };

namespace gpu {

// What the driver's functions put into a map, and the copy unit reads: `hopper_emulator.Map`.
struct Map {
  uint64_t address, sizes[4], steps[3];  // steps in bytes
  uint32_t rank, bytes_each, line, pixels, box[4], stride;
  int32_t lower[2], upper[2];
};
static_assert(sizeof(Map) <= 128, "it lies where the kernel's own description would");

struct Barrier { unsigned arrivals = 0, missing = 0; int64_t bytes = 0; unsigned phase = 0; };

// Threads that wait for each other, time after time.
struct Meeting {
  unsigned members, there = 0;
  uint64_t rounds = 0;
};

struct Product { float* sums; uint64_t left, right; bool keep; int n, slot; };

struct Warp {
  Meeting meeting{32};
  uint32_t traded[32] = {};
  std::deque<std::array<const uint32_t*, 32>> left;  // operands in registers, of each product that had some
};

struct Block {
  Index place;
  std::vector<unsigned char> shared;
  unsigned used = 0, running = 0;  // bytes that are declared; fibers that have not ended
  std::map<int, unsigned> declared;  // where something lies, by the line that declares it
  std::map<unsigned, Barrier> barriers;
  std::map<int, Meeting> turns;  // barriers with a number
  Meeting all;
  std::vector<Warp> warps;
};

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  Block* block;
  Index thread;
  bool done = false, fenced = false;           // whether products may be started
  int issued = 0;                              // products with operands in registers
  std::vector<Product> started;
  std::deque<std::vector<Product>> under_way;  // groups
};

// Of a block's memory, before what is asked for at the launch; aligned no better than CUDA promises.
constexpr unsigned STATIC_BYTES = 528;
constexpr unsigned LONGEST_SLEEP = 9;  // log2 of rounds

// Not `inline`, which all libraries of a process would share.
static bool late;
static ucontext_t scheduler;
static Fiber* current;  // null while none runs
static std::vector<std::unique_ptr<Block>> cluster;
static Meeting* cluster_meeting;
static std::vector<std::function<void()>> copies;  // that are under way
static Index grid_size;
static uint64_t progress;
static std::mt19937 dice;
static std::string failure;
struct Stop {};

inline void yield() { swapcontext(&current->context, &scheduler); }

// Failures end the run; a fiber stops where it is.
[[noreturn]] inline void fail(const std::string& text) {
  if (failure.empty()) failure = text;
  if (!current) throw Stop{};
  for (;;) yield();
}

template <class Condition>
void wait_until(Condition condition) {
  while (!condition()) yield();
  ++progress;
}

inline void meet(Meeting& meeting) {
  uint64_t round = meeting.rounds;
  if (++meeting.there == meeting.members) meeting.there = 0, ++meeting.rounds;
  ++progress;
  wait_until([&] { return meeting.rounds > round; });
}

inline Warp& warp() { return current->block->warps[current->thread.x / 32]; }
inline unsigned char* at(Block& block, unsigned address, unsigned bytes) {
  if (address + bytes > block.shared.size()) fail("an address lies beyond the shared memory");
  return block.shared.data() + address;
}

// The swizzle of lines of so many bytes.
inline unsigned swizzled(unsigned address, unsigned line) {
  unsigned rows = line == 128 ? 7 : line == 64 ? 3 : 1;
  return address ^ ((address >> 7 & rows) << 4);
}

inline float widened16(uint16_t bits, bool bfloat16) {
  if (bfloat16) {
    uint32_t word = (uint32_t)bits << 16;
    float v;
    memcpy(&v, &word, 4);
    return v;
  }
  int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  float v = exponent == 31 ? (mantissa ? NAN : INFINITY)
            : exponent     ? std::ldexp(1024.f + mantissa, exponent - 25)
                           : std::ldexp((float)mantissa, -24);
  return bits >> 15 ? -v : v;
}

inline uint16_t narrowed16(float v, bool bfloat16) {
  uint32_t word;
  memcpy(&word, &v, 4);
  uint16_t sign = word >> 16 & 0x8000;
  if (std::isnan(v)) return bfloat16 ? 0x7FC0 : 0x7E00;
  if (bfloat16) return (uint16_t)((word + 0x7FFF + (word >> 16 & 1)) >> 16);
  float size = std::fabs(v);
  if (size >= 65520.f) return sign | 0x7C00;
  int exponent = size < std::ldexp(1.f, -14) ? -14 : std::ilogb(size);
  int units = (int)std::nearbyint(std::ldexp(size, 10 - exponent));  // of the last place, to even
  return sign | (uint16_t)(units + ((exponent + 14) << 10));         // a carry becomes the next exponent
}

inline float widened8(uint8_t bits) {  // e4m3 without infinities
  int exponent = bits >> 3 & 15, mantissa = bits & 7;
  float v = exponent == 15 && mantissa == 7 ? NAN
            : exponent                      ? std::ldexp(8.f + mantissa, exponent - 10)
                                            : std::ldexp((float)mantissa, -9);
  return bits & 128 ? -v : v;
}

inline uint8_t narrowed8(float v) {  // to the nearest, of two as near to the even one, at most 448
  if (std::isnan(v)) return 0x7F;
  float size = std::min(std::fabs(v), 448.f);
  int exponent = size < std::ldexp(1.f, -6) ? -6 : std::ilogb(size);
  int units = (int)std::nearbyint(std::ldexp(size, 3 - exponent));
  return (uint8_t)(units + ((exponent + 6) << 3)) | (std::signbit(v) ? 128 : 0);
}

// An element of an operand that the matrix unit finds by a description, with its inner index side by side, or, where
// `across`, its columns.
template <class Element>
float element(uint64_t description, int row, int inner, bool across) {
  unsigned start = (description & 0x3FFF) << 4, eight_rows = (description >> 32 & 0x3FFF) << 4;
  unsigned kind = description >> 62, line = kind == 1 ? 128 : kind == 2 ? 64 : 32;
  if (across) std::swap(row, inner);
  unsigned address = start + row / 8 * eight_rows + row % 8 * line + inner * Element::BYTES;
  return Element::read(at(*current->block, swizzled(address, line), Element::BYTES));
}

struct Bf16 {
  static constexpr int BYTES = 2, STEP = 16;
  static float read(const unsigned char* from) { uint16_t bits; memcpy(&bits, from, 2); return widened16(bits, true); }
};
struct F16 {
  static constexpr int BYTES = 2, STEP = 16;
  static float read(const unsigned char* from) { uint16_t bits; memcpy(&bits, from, 2); return widened16(bits, false); }
};
struct E4m3 {
  static constexpr int BYTES = 1, STEP = 32;
  static float read(const unsigned char* from) { return widened8(*from); }
};

// The thread's sums of a product (64, n): columns 2 q and 2 q + 1 of each block of 8, of two rows 8 apart.
template <class Element>
void compute(const Product& product) {
  int lane = current->thread.x % 32, q = lane % 4, top = current->thread.x / 32 % 4 * 16 + lane / 4;
  float left[2][Element::STEP];
  for (int half = 0; half < 2; ++half)
    for (int k = 0; k < Element::STEP; ++k)
      if (product.slot < 0) {
        left[half][k] = element<Element>(product.left, top + 8 * half, k, false);
      } else {  // of the four threads of a row each has the elements 2 q and 2 q + 1 of both halves
        uint32_t word = warp().left[product.slot][lane - q + k % 8 / 2][2 * (k / 8) + half];
        uint16_t bits = k % 2 ? word >> 16 : word;
        left[half][k] = Element::read((const unsigned char*)&bits);
      }
  for (int i = 0; i < product.n / 8; ++i)
    for (int column = 0; column < 2; ++column) {
      float right[Element::STEP];
      for (int k = 0; k < Element::STEP; ++k)
        right[k] = element<Element>(product.right, 8 * i + 2 * q + column, k, product.slot >= 0);
      for (int half = 0; half < 2; ++half) {
        float& sum = product.sums[4 * i + 2 * half + column];
        float total = product.keep ? sum : 0.f;
        for (int k = 0; k < Element::STEP; ++k) total += left[half][k] * right[k];
        sum = total;
      }
    }
}

static void (*compute_one)(const Product&);  // of the kernel's type

inline void start_product(Product product) {
  if (!current->fenced) fail("a product is started without a fence before it");
  if (late)
    current->started.push_back(product);
  else
    compute_one(product);
}

template <class Element>
void multiply_add(float* sums, int n, uint64_t left, uint64_t right, int keep) {
  compute_one = compute<Element>;
  start_product({sums, left, right, keep != 0, n, -1});
}

template <class Element>
void multiply_add(float* sums, int n, const uint32_t (&left)[4], uint64_t right, int keep) {
  compute_one = compute<Element>;
  int slot = current->issued++;
  if (slot == (int)warp().left.size()) warp().left.emplace_back();
  warp().left[slot][current->thread.x % 32] = left;
  meet(warp().meeting);
  start_product({sums, 0, right, keep != 0, n, slot});
}

inline Barrier& made(Block& block, unsigned address) {
  Barrier& barrier = block.barriers[address];
  if (barrier.arrivals == 0) fail("a barrier is used before it is made");
  return barrier;
}

// Complete the barrier's phase if nothing is missing.
inline void look(Barrier& barrier) {
  if (barrier.missing == 0 && barrier.bytes == 0) barrier.missing = barrier.arrivals, ++barrier.phase;
  ++progress;
}
inline void arrive(Barrier& barrier) {
  if (barrier.missing == 0) fail("more arrive at a barrier than it waits for");
  --barrier.missing;
  look(barrier);
}

// Lines of bytes from a tensor to where they belong in some blocks' memory, later.
inline void copy(const Map& map, std::vector<int> coordinates, std::vector<int> offsets, unsigned to, unsigned barrier,
                 std::vector<Block*> blocks) {
  if (to % 128) fail("a copy starts where none may");
  copies.push_back([=] {
    unsigned rows = map.pixels;
    if (rows == 0) {
      rows = 1;
      for (unsigned i = 1; i < map.rank; ++i) rows *= map.box[i];
    }
    std::vector<int> place = coordinates;
    for (unsigned row = 0; row < rows; ++row) {
      int64_t from = 0;
      bool inside = true;
      unsigned rest = row;
      for (unsigned i = 1; i < map.rank; ++i) {
        int index;
        if (map.pixels) {
          index = place[i] + (i < 3 ? offsets[i - 1] : 0);
        } else {
          index = coordinates[i] + (int)(rest % map.box[i]);
          rest /= map.box[i];
        }
        inside = inside && index >= 0 && index < (int64_t)map.sizes[i];
        from += index * (int64_t)map.steps[i - 1];
      }
      for (unsigned byte = 0; byte < map.line; ++byte) {
        int64_t channel = coordinates[0] + byte / map.bytes_each;
        bool there = inside && channel < (int64_t)map.sizes[0];
        const unsigned char* source = (const unsigned char*)map.address + from + coordinates[0] * (int)map.bytes_each;
        for (Block* block : blocks)
          *at(*block, swizzled(to + row * map.line + byte, map.line), 1) = there ? source[byte] : 0;
      }
      if (map.pixels) {  // to the next pixel
        place[1] += map.stride;
        if (place[1] > (int)map.sizes[1] - 1 + map.upper[0]) {
          place[1] = map.lower[0];
          place[2] += map.stride;
          if (place[2] > (int)map.sizes[2] - 1 + map.upper[1]) place[2] = map.lower[1], ++place[3];
        }
      }
    }
    for (Block* block : blocks) {
      if (block->running == 0) fail("a copy comes to a block that has ended");
      made(*block, barrier).bytes -= rows * map.line;
      look(made(*block, barrier));
    }
  });
  ++progress;
}

template <class T>
T* declared(int line, unsigned count) {
  Block& block = *current->block;
  auto found = block.declared.find(line);
  if (found == block.declared.end()) {
    found = block.declared.emplace(line, block.used).first;
    block.used += (count * sizeof(T) + 15) / 16 * 16;
    if (block.used > STATIC_BYTES) fail("more is declared in shared memory than there is room for");
  }
  return (T*)at(block, found->second, count * sizeof(T));
}

static std::function<void()> body;
inline void enter() {
  body();
  current->done = true;
  --current->block->running;
  ++progress;
  for (;;) yield();
}

inline void land_a_copy() {
  current = nullptr;
  std::swap(copies[dice() % copies.size()], copies.back());
  std::function<void()> landing = std::move(copies.back());
  copies.pop_back();
  landing();
}

// Run a cluster's blocks to their end.
inline void run_cluster(unsigned first, unsigned blocks, unsigned threads, unsigned dynamic_bytes) {
  Meeting meeting{blocks * threads};
  cluster_meeting = &meeting;
  cluster.clear();
  copies.clear();
  std::vector<std::unique_ptr<Fiber>> fibers;
  for (unsigned b = 0; b < blocks; ++b) {
    cluster.push_back(std::make_unique<Block>());
    Block& block = *cluster.back();
    block.place = {first + b, 0, 0};
    block.shared.assign(STATIC_BYTES + dynamic_bytes, 0xFF);
    block.all.members = block.running = threads;
    block.warps.resize(threads / 32);
    for (unsigned t = 0; t < threads; ++t) {
      fibers.push_back(std::make_unique<Fiber>());
      Fiber& fiber = *fibers.back();
      fiber.block = &block;
      fiber.thread = {t, 0, 0};
      fiber.stack.resize(1 << 17);
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.data();
      fiber.context.uc_stack.ss_size = fiber.stack.size();
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, enter, 0);
    }
  }
  std::vector<bool> asleep(blocks * threads / 32);
  bool stuck = false;
  for (unsigned left = fibers.size(), round = 0, until = 0; left; ++round) {
    uint64_t before = progress;
    if (stuck) {  // all may wait for one that sleeps
      asleep.assign(asleep.size(), false);
    } else if (round == until) {
      for (size_t warp = 0; warp < asleep.size(); ++warp) asleep[warp] = dice() % 2;
      until = round + (1u << dice() % (LONGEST_SLEEP + 1));
    }
    for (size_t i = fibers.size(); i > 1; --i) std::swap(fibers[i - 1], fibers[dice() % i]);
    for (auto& fiber : fibers) {
      if (fiber->done || asleep[((fiber->block->place.x - first) * threads + fiber->thread.x) / 32]) continue;
      current = fiber.get();
      swapcontext(&scheduler, &current->context);
      if (!failure.empty()) return;
      left -= fiber->done;
      if (!copies.empty() && dice() % (8 * threads) == 0) land_a_copy();
    }
    bool still = stuck && progress == before;
    stuck = progress == before;
    if (still) {  // all wait; for a copy, if there is one
      if (copies.empty()) {
        failure = "all threads wait for each other";
        return;
      }
      land_a_copy();
    }
  }
  if (!copies.empty()) failure = "a block has ended, and a copy into its memory has not";
  for (auto& fiber : fibers)
    if (fiber->started.size() || fiber->under_way.size()) failure = "a block has ended, and its products have not";
}

template <class... Parameters, size_t... I>
void call(void (*kernel)(Parameters...), void** arguments, std::index_sequence<I...>) {
  kernel(*(std::remove_reference_t<Parameters>*)arguments[I]...);
}

template <class... Parameters>
const char* launch(void (*kernel)(Parameters...), void** arguments, unsigned blocks, unsigned together,
                   unsigned threads, unsigned dynamic_bytes, unsigned seed, bool as_late_as_can_be) {
  failure.clear();
  dice.seed(seed);
  late = as_late_as_can_be;
  grid_size = {blocks, 1, 1};
  body = [=] { call(kernel, arguments, std::index_sequence_for<Parameters...>{}); };
  try {
    for (unsigned first = 0; first < blocks && failure.empty(); first += together)
      run_cluster(first, together, threads, dynamic_bytes);
  } catch (const Stop&) {
  }
  return failure.c_str();
}

}  // namespace gpu

#define threadIdx (gpu::current->thread)
#define blockIdx (gpu::current->block->place)
#define gridDim (gpu::grid_size)

inline unsigned char* dynamic_shared() { return gpu::current->block->shared.data() + gpu::STATIC_BYTES; }
inline float __uint_as_float(unsigned bits) { float v; memcpy(&v, &bits, 4); return v; }
inline float __int_as_float(int bits) { return __uint_as_float(bits); }
inline void __syncwarp() { gpu::meet(gpu::warp().meeting); }
inline void __syncthreads() { gpu::meet(gpu::current->block->all); }
inline void __threadfence_block() {}
inline int atomicAdd(int* at, int more) { int old = *at; *at += more; return old; }
inline size_t __cvta_generic_to_shared(const void* at) {
  return (const unsigned char*)at - gpu::current->block->shared.data();
}
template <class T>
T trade(T v, int from) {
  static_assert(sizeof(T) == 4);
  gpu::Warp& warp = gpu::warp();
  memcpy(&warp.traded[threadIdx.x % 32], &v, 4);
  gpu::meet(warp.meeting);
  memcpy(&v, &warp.traded[from], 4);
  gpu::meet(warp.meeting);  // before the next trade
  return v;
}
template <class T>
T __shfl_sync(unsigned, T v, int from) { return trade(v, from); }
template <class T>
T __shfl_xor_sync(unsigned, T v, int mask) { return trade(v, (threadIdx.x % 32) ^ mask); }

// The instructions.

inline gpu::Barrier& barrier_of(unsigned address) { return gpu::made(*gpu::current->block, address); }
inline void ptx_barrier_init(unsigned barrier, unsigned arrivals) {
  gpu::current->block->barriers[barrier] = {arrivals, arrivals, 0, 0};
}
inline void ptx_nothing(...) {}
inline void ptx_barrier_expect(unsigned barrier, unsigned bytes) {
  barrier_of(barrier).bytes += bytes;
  gpu::arrive(barrier_of(barrier));
}
inline void ptx_barrier_arrive(unsigned barrier, unsigned block) {
  if (block >= gpu::cluster.size()) gpu::fail("a barrier is said to be in a block that is not there");
  gpu::Block& there = *gpu::cluster[block];
  if (there.running == 0) gpu::fail("a block that has ended is told something");
  gpu::arrive(gpu::made(there, barrier));
}
inline void ptx_barrier_wait(unsigned barrier, unsigned parity) {
  gpu::Barrier& there = barrier_of(barrier);
  gpu::wait_until([&] { return (there.phase & 1) != parity; });
}
inline void ptx_cluster_sync() { gpu::meet(*gpu::cluster_meeting); }
inline gpu::Meeting& turn_of(int number, unsigned members) {
  return gpu::current->block->turns.emplace(number, gpu::Meeting{members}).first->second;
}
inline void ptx_bar_sync(int number, unsigned members) { gpu::meet(turn_of(number, members)); }
inline void ptx_bar_arrive(int number, unsigned members) {
  gpu::Meeting& meeting = turn_of(number, members);
  if (++meeting.there == meeting.members) meeting.there = 0, ++meeting.rounds;
  ++gpu::progress;
}
inline void ptx_wgmma_fence() { gpu::current->fenced = true; }
inline void ptx_wgmma_commit() {
  gpu::current->under_way.push_back(std::move(gpu::current->started));
  gpu::current->fenced = false;
}
inline void ptx_wgmma_wait(unsigned may_be_under_way) {
  gpu::meet(gpu::warp().meeting);  // all have started what is computed
  for (; gpu::current->under_way.size() > may_be_under_way; gpu::current->under_way.pop_front())
    for (const gpu::Product& product : gpu::current->under_way.front()) gpu::compute_one(product);
  gpu::meet(gpu::warp().meeting);  // nobody goes on while another still reads
}
template <class Map>
const gpu::Map& described(const Map* map) { return *(const gpu::Map*)map; }
template <class Map>
void ptx_copy_pixels(unsigned to, const Map* map, unsigned barrier, int channel, int column, int row, int image,
                     short right, short down) {
  gpu::copy(described(map), {channel, column, row, image}, {right, down}, to, barrier, {gpu::current->block});
}
template <class Map>
void ptx_copy_weights(unsigned to, const Map* map, unsigned barrier, int channel, int tap, int row, short mask) {
  std::vector<gpu::Block*> blocks;
  for (size_t i = 0; i < gpu::cluster.size(); ++i)
    if (mask >> i & 1) blocks.push_back(gpu::cluster[i].get());
  gpu::copy(described(map), {channel, tap, row}, {}, to, barrier, blocks);
}
template <class Map>
void ptx_copy_head(unsigned to, const Map* map, unsigned barrier, int zero, int part, int window) {
  gpu::copy(described(map), {zero, part, zero, window}, {}, to, barrier, {gpu::current->block});
}
inline void ptx_exp2(float& y, float x) { y = std::exp2(x); }
inline void ptx_tanh(float& y, float x) { y = std::tanh(x); }
inline void ptx_reciprocal(float& y, float x) { y = 1.f / x; }
inline void ptx_widen_f16(float& x, float& y, unsigned word) {
  x = gpu::widened16(word, false), y = gpu::widened16(word >> 16, false);
}
inline void ptx_narrow_f16(unsigned& word, float high, float low) {
  word = (unsigned)gpu::narrowed16(high, false) << 16 | gpu::narrowed16(low, false);
}
inline void ptx_narrow_bf16(unsigned& word, float high, float low) {
  word = (unsigned)gpu::narrowed16(high, true) << 16 | gpu::narrowed16(low, true);
}
inline void ptx_narrow_e4m3(unsigned short& half, float high, float low) {
  half = gpu::narrowed8(high) << 8 | gpu::narrowed8(low);
}
