// The kernels for every processor: with four floats in a register, as x86-64 and aarch64 have them.
#include "kernels_includes.h"

#if defined(__aarch64__)
#define FUSED(a, b, c) ((F)vfmaq_f32((float32x4_t)(c), (float32x4_t)(a), (float32x4_t)(b)))
#else
#define FUSED(a, b, c) ((a) * (b) + (c))
#endif
#define STREAM_FLOATS(to, value) (*reinterpret_cast<FMemory*>(to) = (value))
#define STREAM_HALVES(to, value) (*reinterpret_cast<HMemory*>(to) = (value))
#define STREAM_END()

namespace gcond {
namespace cpu {
namespace portable {

constexpr int WIDTH = 4, TILE = 2;
#include "lanes.h"
// After what it uses.
#include "kernels_body.h"

bool runs_here() { return true; }

}  // namespace portable

const Kernels PORTABLE = portable::table("portable", portable::runs_here);

}  // namespace cpu
}  // namespace gcond
