// What the variants of the kernels include, before they choose instructions: inline functions of
// these headers must not be compiled with any that the processor may lack.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define GCOND_X86
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
