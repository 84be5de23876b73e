// The kernels for x86-64 with AVX2.
#include "kernels_includes.h"

#ifdef GCOND_X86
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#define FUSED(a, b, c) ((F)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))
#define STREAM_FLOATS(to, value) _mm256_stream_ps(to, (__m256)(value))
#define STREAM_HALVES(to, value) _mm_stream_si128((__m128i*)(to), (__m128i)(value))
#define STREAM_END() _mm_sfence()

namespace gcond {
namespace cpu {
namespace avx2 {

constexpr int WIDTH = 8, TILE = 2;
#include "lanes.h"
// After what it uses.
#include "kernels_body.h"

bool runs_here() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

}  // namespace avx2

const Kernels AVX2 = avx2::table("avx2", avx2::runs_here);

}  // namespace cpu
}  // namespace gcond

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
