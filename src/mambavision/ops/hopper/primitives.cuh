// What the kernels for GPUs of the Hopper generation have in common: barriers that count bytes, what the matrix unit is
// told, and pairs of numbers of 16 bits.
//
// A constant that the host defines: BFLOAT16, whether the 16 bits are those.
//
// Source: NVIDIA, "Parallel Thread Execution ISA", sections on wgmma, cp.async.bulk.tensor and mbarrier.

typedef unsigned int u32;
typedef unsigned long long u64;
struct alignas(64) TensorMap { u64 opaque[16]; };

__device__ __forceinline__ u32 shared_address(const void* at) { return (u32)__cvta_generic_to_shared(at); }

// Where stages may begin in a block's memory: the longest swizzle repeats every 1,024 bytes.
__device__ __forceinline__ u32 stages_in(const void* memory) { return (shared_address(memory) + 1023) & ~1023u; }

// Which 128 threads this one belongs to; said so that the compiler knows that a warp's threads agree on it.
__device__ __forceinline__ int group_of_thread() { return __shfl_sync(~0u, threadIdx.x / 128, 0); }

__device__ __forceinline__ void barrier_init(u32 barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

// Behind the initialisations, for whoever else uses the barriers.
__device__ __forceinline__ void show_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// The only arrival of a stage that is to be filled with so many bytes.
__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Arrive at the barrier of that block of the cluster. With the default scope: a wider one would wait for all of the
// thread's earlier stores, at three tenths of the kernel's time.
__device__ __forceinline__ void barrier_arrive(u32 barrier, u32 block) {
  asm volatile(
      "{\n.reg .u32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(barrier), "r"(block) : "memory");
}

__device__ __forceinline__ void barrier_wait(u32 barrier, u32 phase) {
  asm volatile(
      "{\n.reg .pred done;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra AGAIN;\n}" ::"r"(barrier), "r"(phase) : "memory");
}

__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// Around the products that are started and not waited for yet.
__device__ __forceinline__ void start_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int UNDER_WAY>  // groups of them that may still be
__device__ __forceinline__ void await_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(UNDER_WAY) : "memory");
}

// Have the compiler keep sums in their registers, which the matrix unit reads and writes behind its back.
template <int COUNT>
__device__ __forceinline__ void settle(float (&sums)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

// How the matrix unit finds an operand, in units of 16 bytes: where it starts, how far eight rows are from the next
// eight, and the swizzle, 1 of 128 bytes, 2 of 64, 3 of 32.
template <int BYTES>
__device__ __forceinline__ u64 operand(u32 at) {
  constexpr u64 SWIZZLE = BYTES == 128 ? 1 : BYTES == 64 ? 2 : 3;
  return (u64)((at & 0x3FFFF) >> 4) | (1ull << 16) | ((u64)(8 * BYTES / 16) << 32) | (SWIZZLE << 62);
}

__device__ __forceinline__ float power_of_two(float v) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(v));
  return power;
}

// Two neighbouring elements from and to a word.
__device__ __forceinline__ float2 widened(u32 word) {
  float2 v;
#if BFLOAT16
  v.x = __uint_as_float(word << 16);
  v.y = __uint_as_float(word & 0xFFFF0000u);
#else
  asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %2;\ncvt.f32.f16 %0, low;\ncvt.f32.f16 %1, high;\n}"
      : "=f"(v.x), "=f"(v.y) : "r"(word));
#endif
  return v;
}
__device__ __forceinline__ u32 narrowed(float x, float y) {
  u32 word;
#if BFLOAT16
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(y), "f"(x));
#else
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(y), "f"(x));
#endif
  return word;
}

// Of two neighbouring blocks of 8 columns a thread has a word of each: trade one with the thread beside it, for two
// words side by side of the first block, or, where the thread is odd, of the second.
__device__ __forceinline__ uint2 traded(u32 first, u32 second, bool odd) {
  u32 got = __shfl_xor_sync(~0u, odd ? first : second, 1);
  return odd ? make_uint2(got, second) : make_uint2(first, got);
}
