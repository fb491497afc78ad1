// 3x3 convolution with zeros around it, or linear layer, and what follows it, for GPUs of the Hopper generation.
//
// A product of matrices whose left one is never formed: its rows are pixels, which the copy unit gathers, and its inner
// index runs over taps and channels.
//
// Why not Triton: its tiles have powers of two columns, and of what it computes for 208 columns a fifth is thrown away;
// the matrix unit takes any multiple of 8. And its threads wait while a tile's sums are finished; here one team of
// threads finishes a tile while the other multiplies the next.
//
// A block of threads lives as long as the grid and walks over the tiles. One thread only starts copies into a ring of
// STAGES: each is CHUNK channels of one tap of ROWS pixels, zeros beyond the map, and of N rows of the weight. Each
// team of MEMBERS x 128 threads multiplies what comes, and with TEAMS = 2 they take tiles in turn. What limits all this
// is what comes from the second-level cache. So the two blocks of a cluster take neighbouring pixels of the same
// columns, and each loads every other stage's weights for both. And where the last channels of a tap are few, they are
// copied as shorter lines: of 208 channels' four copies, the last then has a quarter of the bytes.
//
// With FLOAT8 the operands have 8 bits, their product has a scale for each column, and what comes out is rounded to 8
// bits too: `copy`. Then `out`, in 16 bits, is written with a residual only, which has that type.
//
// Constants that the host defines: COLUMNS of the result; CHANNELS of the map; SIZE, 3 or, for linear layers, 1;
// STRIDE; FLOAT8; BFLOAT16, whether the 16 bits are those; HAS_BIAS, always with FLOAT8; HAS_RESIDUAL; ACTIVATION,
// 0 none, 1 ReLU, 2 GELU by tanh; N, columns of a tile, a multiple of 8; TEAMS; MEMBERS; PARTS, products of 64 rows
// that a thread takes part in; STAGES; CLUSTER; LINE, bytes that a copy brings of a row, which are swizzled; LAST_LINE,
// those of a tap's last copy. And the function `wgmma`, sums (64, N) += left (64, STEP) right (STEP, N).
//
// Source: `primitives.cuh`, which comes before this. Taking turns: Shah et al., "FlashAttention-3" (arXiv 2407.08608),
// section 3.1.

constexpr int CHUNK = FLOAT8 ? LINE : LINE / 2, STEP = FLOAT8 ? 32 : 16;  // channels; a step is 32 bytes
constexpr int CHUNKS = (CHANNELS + CHUNK - 1) / CHUNK;
constexpr int LAST_STEPS = (CHANNELS - (CHUNKS - 1) * CHUNK + STEP - 1) / STEP;  // the last chunk may be narrower
constexpr int TAPS = SIZE * SIZE;
constexpr int LENGTH = TAPS * CHUNKS;                                    // stages of a tile
constexpr int TILES = (COLUMNS + N - 1) / N;                             // of columns
constexpr int GROUPS = TEAMS * MEMBERS;                                  // of 128 threads that multiply
constexpr int ROWS = 64 * MEMBERS * PARTS;
constexpr u32 LEFT_BYTES = ROWS * LINE, RIGHT_BYTES = N * LINE;
constexpr u32 STAGE_BYTES = LEFT_BYTES + RIGHT_BYTES;
static_assert(LINE == 128, "the longest line that can be swizzled");
static_assert(LAST_STEPS * 32 <= LAST_LINE, "the last channels are in the last copy");
static_assert(STAGE_BYTES % 1024 == 0, "the swizzle repeats every 1,024 bytes");

// Teams wait for their turn and hand it on.
__device__ __forceinline__ void await_turn(int team) {
  if (TEAMS > 1) asm volatile("bar.sync %0, %1;" ::"r"(1 + team), "n"(128 * GROUPS) : "memory");
}
__device__ __forceinline__ void give_turn(int team) {
  if (TEAMS > 1) asm volatile("bar.arrive %0, %1;" ::"r"(1 + team), "n"(128 * GROUPS) : "memory");
}

// A line of channels of ROWS pixels from one on, each moved by a tap.
__device__ __forceinline__ void load_pixels(
    u32 to, const TensorMap& map, u32 barrier, int channel, int column, int row, int image, int tap) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2], {%7, %8};" ::"r"(to), "l"(&map), "r"(barrier), "r"(channel), "r"(column),
      "r"(row), "r"(image), "h"((short)(tap % SIZE)), "h"((short)(tap / SIZE)) : "memory");
}

// A line of channels of N rows of the weight, for all blocks of the cluster.
__device__ __forceinline__ void load_weights(u32 to, const TensorMap& map, u32 barrier, int channel, int tap, int row) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(to), "l"(&map), "r"(barrier), "r"(channel), "r"(tap), "r"(row),
      "h"((short)((1 << CLUSTER) - 1)) : "memory");
}

// Start adding the products of so many steps' channels, which lie in lines of BYTES.
template <int STEPS, int BYTES>
__device__ __forceinline__ void multiply(float (&sums)[PARTS][N / 2], u32 left, u32 right, int member) {
  u64 left_operand = operand<BYTES>(left + member * PARTS * 64 * BYTES), right_operand = operand<BYTES>(right);
  start_products();
#pragma unroll
  for (int step = 0; step < STEPS; ++step)
#pragma unroll
    for (int part = 0; part < PARTS; ++part)
      wgmma(sums[part], left_operand + part * (64 * BYTES / 16) + 2 * step, right_operand + 2 * step, 1);
  commit_products();
}

__device__ __forceinline__ float activated(float v) {
#if ACTIVATION == 1
  return v < 0.f ? 0.f : v;  // which keeps NaN
#elif ACTIVATION == 2 && (FLOAT8 || BFLOAT16)
  // The unit's tanh is off by up to 2^-11 of its size, and so this by up to |v| 2^-12: of a positive v's result an
  // eighth of what rounding to bfloat16 takes, of a negative one's, which is small, more.
  float curve, half = 0.5f * v;
  asm("tanh.approx.f32 %0, %1;" : "=f"(curve) : "f"(v * (0.7978845608028654f + 0.035677406412766f * v * v)));
  return half + half * curve;
#elif ACTIVATION == 2
  // 0.5 (1 + tanh u) is the logistic function of 2 u.
  float share, u = v * (1.5957691216057308f + 0.07135481282553245f * v * v);
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(share) : "f"(1.f + power_of_two(-1.4426950408889634f * u)));
  return v * share;
#else
  return v;
#endif
}

// Two numbers in 8 bits, in a half word; what is larger than 448 is cut.
__device__ __forceinline__ u32 rounded(float x, float y) {
  unsigned short half;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(half) : "f"(y), "f"(x));
  return half;
}

// Whether a block of 8 columns of a tile is one of the result's.
__device__ __forceinline__ bool is_column(int first) { return COLUMNS % N == 0 || first < COLUMNS; }

// A thread has the elements 2 q and 2 q + 1 of each block of 8 columns, of two pixels 8 apart. They start from the
// bias, so that its loads are not waited for at the end of the tile. Columns beyond the last have that of the last.
__device__ __forceinline__ void begin(float (&sums)[PARTS][N / 2], const void* bias, int column, int q) {
#pragma unroll
  for (int i = 0; i < N / 8; ++i) {
    float2 first = {0.f, 0.f};
#if HAS_BIAS && !FLOAT8
    int from = column + 8 * i + 2 * q;
    first = widened(((const u32*)bias)[(COLUMNS % N == 0 ? from : min(from, COLUMNS - 2)) / 2]);
#endif
#pragma unroll
    for (int part = 0; part < PARTS; ++part)
      sums[part][4 * i] = sums[part][4 * i + 2] = first.x, sums[part][4 * i + 1] = sums[part][4 * i + 3] = first.y;
  }
}

// What follows the product, for 64 pixels, and the stores. Neighbours trade, so that each reads and writes 8 bytes in a
// row: four columns of one of two blocks, or all eight, in 8 bits, of one of four. A pointer for each tensor, all else
// in the instructions.
__device__ __forceinline__ void finish(
    float (&sums)[N / 2], const float* scale, const void* bias, const u32* residual, u32* out, unsigned char* copy,
    int pixel, int pixels, int column, int q) {
  constexpr int BLOCKS = N / 8, BATCH = 4, BELOW = 8 * COLUMNS;  // elements from the first pixel to the second
  constexpr bool WIDE = !FLOAT8 || HAS_RESIDUAL;                 // whether `out` is written
  constexpr bool IN_PAIRS = COLUMNS % 16 == 0 && N % 16 == 0;    // whether of two blocks both are the result's, or none
  bool odd = q & 1, upper = q & 2;
  bool inside[2] = {pixel < pixels, pixel + 8 < pixels};
  u64 at = (u64)pixel * COLUMNS + column;
  residual += at / 2 + (q & 2) + 4 * odd;
  out += at / 2 + (q & 2) + 4 * odd;
  copy += at + 8 * q;
  int alone = -3 * odd;  // words from there to the thread's own, of a block without a neighbour
#pragma unroll
  for (int i = 0; i < BLOCKS; ++i) {
#if FLOAT8
    int from = column + 8 * i + 2 * q;
    if (COLUMNS % N) from = min(from, COLUMNS - 2);
    float2 factor = *(const float2*)(scale + from), shift = *(const float2*)((const float*)bias + from);
#endif
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float& x = sums[4 * i + 2 * half];
      float& y = sums[4 * i + 2 * half + 1];
#if FLOAT8
      x = x * factor.x + shift.x;
      y = y * factor.y + shift.y;
#endif
      x = activated(x);
      y = activated(y);
    }
  }
#pragma unroll
  for (int first = 0; first < BLOCKS; first += BATCH) {
    u32 words[BATCH][2], halves[BATCH][2];
#if HAS_RESIDUAL
#pragma unroll
    for (int i = 0; i < BATCH && first + i < BLOCKS; i += 2)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const u32* from = residual + 4 * (first + i) + half * (BELOW / 2);
        if (first + i + 1 < BLOCKS) {
          uint2 two = {0, 0};
          if (inside[half] && is_column(column + 8 * (first + i + (IN_PAIRS ? 0 : odd)))) two = *(const uint2*)from;
          uint2 both = traded(two.x, two.y, odd);
          words[i][half] = both.x;
          words[i + 1][half] = both.y;
        } else {
          words[i][half] = inside[half] && is_column(column + 8 * (first + i)) ? from[alone] : 0;
        }
      }
#endif
#pragma unroll
    for (int i = 0; i < BATCH && first + i < BLOCKS; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float x = sums[4 * (first + i) + 2 * half], y = sums[4 * (first + i) + 2 * half + 1];
#if HAS_RESIDUAL
        float2 more = widened(words[i][half]);
        x += more.x;
        y += more.y;
#endif
        if (WIDE) words[i][half] = narrowed(x, y);
        if (FLOAT8) halves[i][half] = rounded(x, y);
      }
    if (WIDE)
#pragma unroll
      for (int i = 0; i < BATCH && first + i < BLOCKS; i += 2)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          u32* to = out + 4 * (first + i) + half * (BELOW / 2);
          if (first + i + 1 < BLOCKS) {
            uint2 two = traded(words[i][half], words[i + 1][half], odd);
            if (inside[half] && is_column(column + 8 * (first + i + (IN_PAIRS ? 0 : odd)))) *(uint2*)to = two;
          } else if (inside[half] && is_column(column + 8 * (first + i))) {
            to[alone] = words[i][half];
          }
        }
    if (FLOAT8)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        unsigned char* to = copy + 8 * first + half * BELOW;
        if (first + BATCH <= BLOCKS) {
          u32 fours[2];
#pragma unroll
          for (int i = 0; i < BATCH; i += 2) {
            u32 got = __shfl_xor_sync(~0u, odd ? halves[i][half] : halves[i + 1][half], 1);
            fours[i / 2] = odd ? got | halves[i + 1][half] << 16 : halves[i][half] | got << 16;
          }
          u32 got = __shfl_xor_sync(~0u, upper ? fours[0] : fours[1], 2);
          uint2 eight = upper ? make_uint2(got, fours[1]) : make_uint2(fours[0], got);
          if (inside[half] && is_column(column + 8 * (first + q))) *(uint2*)to = eight;  // block q of four
        } else {
#pragma unroll
          for (int i = 0; first + i < BLOCKS; ++i)
            if (inside[half] && is_column(column + 8 * (first + i)))
              *(unsigned short*)(to + 8 * i - 6 * q) = (unsigned short)halves[i][half];
        }
      }
  }
}

// Grid: blocks that the GPU holds at once, or fewer. `items`: pairs of tiles, one for each block of a cluster.
extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(128 * (GROUPS + 1), 1) product(
    const __grid_constant__ TensorMap x_map,       // (batch, height, width, CHANNELS)
    const __grid_constant__ TensorMap weight_map,  // (COLUMNS, TAPS, CHANNELS)
    const __grid_constant__ TensorMap x_last,      // the same two, for lines of LAST_LINE
    const __grid_constant__ TensorMap weight_last,
    const float* scale,                            // (COLUMNS,), with FLOAT8
    const void* bias,                              // (COLUMNS,), with FLOAT8 float32, else in the type of x
    const u32* residual,                           // (batch, out_height, out_width, COLUMNS)
    u32* out,                                      // the same
    unsigned char* copy,                           // the same, with FLOAT8
    int pixels, int out_height, int out_width, int items) {
  extern __shared__ unsigned char memory[];
  __shared__ u64 barriers[2 * STAGES];
  u32 stages = stages_in(memory), full = shared_address(barriers), empty = full + 8 * STAGES;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < STAGES; ++stage) {
      barrier_init(full + 8 * stage, 1);
      barrier_init(empty + 8 * stage, 4 * MEMBERS * CLUSTER);  // the warps that read it; weights go to all blocks
    }
    show_barriers();
  }
  cluster_sync();
  int rank = blockIdx.x % CLUSTER, clusters = gridDim.x / CLUSTER;
  int stage = 0;
  u32 phase = 0;

  int group = group_of_thread();
  if (group == GROUPS) {  // these copy, and leave their registers to the others
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    if (threadIdx.x % 128 == 0) {
      int turn = 0;  // which block loads the weights
      for (int item = blockIdx.x / CLUSTER; item < items; item += clusters) {
        int weight_row = item % TILES * N;
        int pixel = (item / TILES * CLUSTER + rank) * ROWS;
        int image = pixel / (out_height * out_width);
        int row = pixel / out_width % out_height * STRIDE - SIZE / 2;
        int column = pixel % out_width * STRIDE - SIZE / 2;
#if HAS_RESIDUAL
        int many = (pixels - pixel < ROWS ? pixels - pixel : ROWS) * COLUMNS * 2;  // bytes needed at the tile's end
        if (many > 0 && item % TILES == 0)  // for all tiles of these pixels
          asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(residual + (u64)pixel * COLUMNS / 2),
                       "r"(many));
#endif
#pragma unroll 1
        for (int tap = 0; tap < TAPS; ++tap)
#pragma unroll 1
          for (int chunk = 0; chunk < CHUNKS; ++chunk) {
            u32 left = stages + stage * STAGE_BYTES;
            bool last = LAST_LINE < LINE && chunk == CHUNKS - 1;
            barrier_wait(empty + 8 * stage, phase ^ 1);
            barrier_expect(full + 8 * stage, last ? STAGE_BYTES / LINE * LAST_LINE : STAGE_BYTES);
            load_pixels(left, last ? x_last : x_map, full + 8 * stage, chunk * CHUNK, column, row, image, tap);
            if (turn == rank)
              load_weights(left + LEFT_BYTES, last ? weight_last : weight_map, full + 8 * stage, chunk * CHUNK, tap,
                           weight_row);
            if (++turn == CLUSTER) turn = 0;
            if (++stage == STAGES) stage = 0, phase ^= 1;
          }
      }
    }
    __syncwarp();
    cluster_sync();  // nobody leaves while others still copy to where it was
    return;
  }

  asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
  int team = group / MEMBERS, member = group % MEMBERS;
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  float sums[PARTS][N / 2];
  if (team == 1) {
    phase = LENGTH / STAGES & 1, stage = LENGTH % STAGES;
    give_turn(0);
  }
  for (int item = blockIdx.x / CLUSTER + team * clusters; item < items; item += TEAMS * clusters) {
    begin(sums, bias, item % TILES * N, lane % 4);
#pragma unroll
    for (int part = 0; part < PARTS; ++part) settle(sums[part]);
    await_turn(team);  // a wait for a stage more than a round ahead would end at once
    int read = -1;     // the stage whose products are still under way
    for (int tap = 0; tap < TAPS; ++tap)
#pragma unroll 1
      for (int chunk = 0; chunk < CHUNKS; ++chunk) {
        u32 left = stages + stage * STAGE_BYTES, right = left + LEFT_BYTES;
        barrier_wait(full + 8 * stage, phase);
        if (chunk < CHUNKS - 1)
          multiply<LINE / 32, LINE>(sums, left, right, member);
        else
          multiply<LAST_STEPS, LAST_LINE>(sums, left, right, member);
        await_products<1>();
        if (read >= 0 && lane < CLUSTER) barrier_arrive(empty + 8 * read, lane);
        read = stage;
        if (++stage == STAGES) stage = 0, phase ^= 1;
      }
    give_turn(1 - team);
    await_products<0>();
    if (lane < CLUSTER) barrier_arrive(empty + 8 * read, lane);
#pragma unroll
    for (int part = 0; part < PARTS; ++part) settle(sums[part]);
    if (TEAMS > 1) phase ^= (stage + LENGTH) / STAGES & 1, stage = (stage + LENGTH) % STAGES;  // the other team's

    int pixel = (item / TILES * CLUSTER + rank) * ROWS + member * PARTS * 64 + warp * 16 + lane / 4;
#pragma unroll
    for (int part = 0; part < PARTS; ++part)
      finish(sums[part], scale, bias, residual, out, copy, pixel + 64 * part, pixels, item % TILES * N, lane % 4);
  }
  cluster_sync();
}
