// Attention of a window's tokens to each other, head by head, for GPUs of the Hopper generation, without gradients.
//
// A window is short: the scores of 64 queries to all of its keys are the sums of one product, which a team of threads
// has in its registers. So there is one softmax, and not one that is mended block by block, and nothing is computed for
// keys beyond the last but what fills up a multiple of 16.
//
// A block of threads lives as long as the grid and walks over windows and heads. TEAMS of 128 threads take the queries
// of a head in turn, 64 at a time, and while one waits for the matrix unit, the other computes exponentials; the scores
// of a team's next tile are multiplied while it finishes this one. The last warp that has read a head starts the copy
// of the one that comes to its place, the next but one. No thread does only that: its registers would be missed.
//
// Constants that the host defines: LENGTH, tokens; KEYS, that many and up to 15 more; FIRST of them, whose weights are
// formed before those of the REST; HEADS; WIDTH, channels of a head, a multiple of 8; BFLOAT16; STAGES, heads that are
// there at once; TEAMS; LINE, bytes of a row in shared memory. And the functions `score_first`, sums (64, FIRST) =
// queries (64, 16) keys^T (16, FIRST), `score_rest` likewise, and `weigh`, sums (64, WIDTH) = weights (64, 16), which
// are in registers, times values (16, WIDTH); where their last argument is not 0, they add.
//
// Source: `primitives.cuh`, which comes before this. What it computes: paper, equation 8.

constexpr int REST = KEYS - FIRST;
constexpr int STEPS = (WIDTH + 15) / 16;         // of a score's sum
constexpr int TILES = (LENGTH + 63) / 64;        // of queries
constexpr u32 PART_BYTES = KEYS * LINE;          // queries, keys or values of a head
constexpr u32 STAGE_BYTES = 3 * PART_BYTES;
constexpr u32 TILE_BYTES = 64 * LINE;            // the last tile reads on into the keys; its results are not stored
static_assert(WIDTH % 8 == 0 && 2 * WIDTH <= LINE && LINE == 128, "a head is a swizzled row");
static_assert(STAGES > 1 && TILES >= TEAMS, "a team waits for the next head before it lets go of this one");
static_assert(KEYS % 16 == 0 && KEYS - LENGTH < 16 && KEYS >= LENGTH && KEYS <= 208, "what registers hold");

// A part of a head, zeros beyond the window and the channels.
__device__ __forceinline__ void load_part(u32 to, const TensorMap& map, u32 barrier, int part, int window) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %3, %5}], [%2];" ::"r"(to), "l"(&map), "r"(barrier), "r"(0), "r"(part), "r"(window)
      : "memory");
}

// Over the four threads that have a row's elements.
__device__ __forceinline__ float largest_of_row(float v) {
  v = fmaxf(v, __shfl_xor_sync(~0u, v, 1));
  return fmaxf(v, __shfl_xor_sync(~0u, v, 2));
}
__device__ __forceinline__ float sum_of_row(float v) {
  v += __shfl_xor_sync(~0u, v, 1);
  return v + __shfl_xor_sync(~0u, v, 2);
}

#define NEVER __int_as_float(0xFF800000)  // the score, minus infinity, of what is no key

// Of a block of 8 columns a thread has the columns 2 q and 2 q + 1 of two rows 8 apart, of scores as of weights. The
// highest score of both rows, among blocks of keys from that one on; keys beyond the last have none.
template <int COUNT>
__device__ __forceinline__ void raise(float (&top)[2], float (&scores)[COUNT], int first, int q) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    int key = 8 * (first + i / 4);
    if (key + 8 > LENGTH && key + 2 * q + i % 2 >= LENGTH) scores[i] = NEVER;
    top[i / 2 % 2] = fmaxf(top[i / 2 % 2], scores[i]);
  }
}

// Weights from scores, up to a factor, and their sums.
template <int COUNT>
__device__ __forceinline__ void weights_of(
    u32 (&weights)[COUNT / 8][4], float (&total)[2], const float (&scores)[COUNT], float rate,
    const float (&least)[2]) {
#pragma unroll
  for (int i = 0; i < COUNT / 2; ++i) {
    float x = power_of_two(scores[2 * i] * rate + least[i % 2]);
    float y = power_of_two(scores[2 * i + 1] * rate + least[i % 2]);
    total[i % 2] += x + y;
    weights[i / 4][i % 4] = narrowed(x, y);
  }
}

// Start the scores of a tile of queries of the head that lies there.
__device__ __forceinline__ void start_scores(
    float (&scores)[FIRST / 2], float (&others)[REST / 2], u32 head, int tile) {
  u64 queries = operand<LINE>(head + tile * TILE_BYTES), keys = operand<LINE>(head + PART_BYTES);
  start_products();
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
    score_first(scores, queries + 2 * step, keys + 2 * step, step);
    score_rest(others, queries + 2 * step, keys + FIRST * LINE / 16 + 2 * step, step);
  }
  commit_products();
}

// Start the copies of a head into its stage.
__device__ __forceinline__ void load_head(u32 stage, const TensorMap& map, u32 full, int item) {
  barrier_expect(full, STAGE_BYTES);
  for (int part = 0; part < 3; ++part)
    load_part(stage + part * PART_BYTES, map, full, part * HEADS + item % HEADS, item / HEADS);
}

// Grid: blocks that the GPU holds at once, or fewer. `rate`: what scores are multiplied by before two is raised to
// them. `items`: windows x HEADS.
extern "C" __global__ void __launch_bounds__(128 * TEAMS, 1) attention(
    const __grid_constant__ TensorMap map,  // of qkv (windows, LENGTH, 3 x HEADS, WIDTH)
    u32* out,                               // (windows, LENGTH, HEADS, WIDTH)
    float rate, int items) {
  extern __shared__ unsigned char memory[];
  __shared__ u64 barriers[STAGES];
  __shared__ int readers[STAGES];  // warps that have read the head that lies there
  u32 stages = stages_in(memory), full = shared_address(barriers);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < STAGES; ++stage) {
      barrier_init(full + 8 * stage, 1);
      readers[stage] = 0;
    }
    show_barriers();
    for (int stage = 0; stage < STAGES; ++stage) {
      int item = blockIdx.x + stage * gridDim.x;
      if (item < items) load_head(stages + stage * STAGE_BYTES, map, full + 8 * stage, item);
    }
  }
  __syncthreads();

  int team = group_of_thread(), lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, q = lane % 4;
  int turns = ((items - (int)blockIdx.x + (int)gridDim.x - 1) / (int)gridDim.x) * TILES;
  float scores[FIRST / 2], others[REST / 2];
  barrier_wait(full, 0);
  start_scores(scores, others, stages, team % TILES);
  for (int turn = team; turn < turns; turn += TEAMS) {
    int nth = turn / TILES, tile = turn % TILES, stage = nth % STAGES, item = blockIdx.x + nth * gridDim.x;
    u32 head = stages + stage * STAGE_BYTES;
    await_products<0>();
    settle(scores);
    settle(others);

    float top[2] = {NEVER, NEVER}, least[2], total[2] = {}, sums[WIDTH / 2];
    u32 weights[FIRST / 16][4], more[REST / 16][4];
    raise(top, scores, 0, q);
    raise(top, others, FIRST / 8, q);
#pragma unroll
    for (int half = 0; half < 2; ++half) least[half] = -rate * largest_of_row(top[half]);
    weights_of(weights, total, scores, rate, least);
    u64 values = operand<LINE>(head + 2 * PART_BYTES);  // 16 rows of it are 16 lines
    start_products();
#pragma unroll
    for (int step = 0; step < FIRST / 16; ++step) weigh(sums, weights[step], values + LINE * step, step);
    commit_products();
    weights_of(more, total, others, rate, least);  // while the first are multiplied
    start_products();
#pragma unroll
    for (int step = 0; step < REST / 16; ++step) weigh(sums, more[step], values + FIRST * LINE / 16 + LINE * step, 1);
    commit_products();

    // The next scores, while this tile is finished. Behind the last come those of any tile, which nobody reads.
    int next = turn + TEAMS < turns ? turn + TEAMS : turn, then = next / TILES % STAGES;
    barrier_wait(full + 8 * then, next / TILES / STAGES & 1);
    start_scores(scores, others, stages + then * STAGE_BYTES, next % TILES);
    await_products<1>();
    if (lane == 0) {
      __threadfence_block();
      if (atomicAdd(&readers[stage], 1) == 4 * TILES - 1) {
        readers[stage] = 0;
        if (item + STAGES * (int)gridDim.x < items) load_head(head, map, full + 8 * stage, item + STAGES * gridDim.x);
      }
    }
    settle(sums);

    bool odd = q & 1;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float share = 1.f / sum_of_row(total[half]);
      int row = tile * 64 + warp * 16 + lane / 4 + 8 * half;
      u64 token = (u64)(item / HEADS) * LENGTH + row;
      bool inside = row < LENGTH;
      u32* to = out + (token * HEADS + item % HEADS) * (WIDTH / 2);
#pragma unroll
      for (int i = 0; i < WIDTH / 8; i += 2) {
        u32 words[2];
#pragma unroll
        for (int j = 0; j < 2 && i + j < WIDTH / 8; ++j)
          words[j] = narrowed(sums[4 * (i + j) + 2 * half] * share, sums[4 * (i + j) + 2 * half + 1] * share);
        if (i + 1 < WIDTH / 8) {
          uint2 two = traded(words[0], words[1], odd);
          if (inside) *(uint2*)(to + 4 * i + (q & 2) + 4 * odd) = two;
        } else if (inside) {
          to[4 * i + q] = words[0];
        }
      }
    }
  }
  await_products<0>();
}
