// The kernels for x86-64 with AVX-512.
#include "kernels_includes.h"

#ifdef GCOND_X86
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")
#endif

#define MASKED
#define FUSED(a, b, c) ((F)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#define STREAM_FLOATS(to, value) _mm512_stream_ps(to, (__m512)(value))
#define STREAM_HALVES(to, value) _mm256_stream_si256((__m256i*)(to), (__m256i)(value))
#define STREAM_END() _mm_sfence()

namespace gcond {
namespace cpu {
namespace avx512 {

constexpr int WIDTH = 16, TILE = 4;
#include "lanes.h"
// After what it uses.
#include "kernels_body.h"

bool runs_here() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("fma");
}

}  // namespace avx512

const Kernels AVX512 = avx512::table("avx512", avx512::runs_here);

}  // namespace cpu
}  // namespace gcond

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
