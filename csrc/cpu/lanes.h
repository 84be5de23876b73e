// Sixteen floats at a time, in as few registers as the processor has for them; part of every
// variant of the kernels (see kernels_avx512.cpp), which defines WIDTH, the floats of a register,
// and FUSED.
//
// Every variant sums in the same sixteen lanes, so that all with a fused multiplication give the
// same bits. Included inside the namespace of the variant; no header may be included here.

constexpr int LANES = 16;
constexpr int REGISTERS = LANES / WIDTH;

typedef float F __attribute__((vector_size(WIDTH * 4)));
typedef std::uint32_t U __attribute__((vector_size(WIDTH * 4)));
typedef std::int32_t I __attribute__((vector_size(WIDTH * 4)));
typedef std::uint16_t H __attribute__((vector_size(WIDTH * 2)));
// The same in memory: at any address, beside other types.
typedef F FMemory __attribute__((aligned(4), may_alias));
typedef H HMemory __attribute__((aligned(2), may_alias));

struct Lanes {
  F of[REGISTERS];
};

// The types of elements whose bits are not a C++ type.
struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

inline F fused(F a, F b, F c) { return FUSED(a, b, c); }

inline U words(std::uint32_t value) { return U{} + value; }

// One operation on every register.
template <class Run>
inline Lanes each(Run run) {
  Lanes result;
#pragma GCC unroll 4
  for (int r = 0; r < REGISTERS; ++r) result.of[r] = run(r);
  return result;
}

inline Lanes splat(float value) {
  return each([&](int) { return F{} + value; });
}

inline Lanes add(const Lanes& a, const Lanes& b) {
  return each([&](int r) { return a.of[r] + b.of[r]; });
}

inline Lanes multiply(const Lanes& a, const Lanes& b) {
  return each([&](int r) { return a.of[r] * b.of[r]; });
}

inline Lanes multiply_add(const Lanes& a, const Lanes& b, const Lanes& c) {
  return each([&](int r) { return fused(a.of[r], b.of[r], c.of[r]); });
}

inline F float_of(BFloat16, U bits) { return (F)(bits << 16); }

// Of half precision: a normal number gets another exponent, infinity and NaN the largest, and what
// is below is a whole number of 2^-24.
inline F float_of(Float16, U bits) {
  const U magnitude = bits & 0x7fff, sign = (bits & 0x8000) << 16;
  const U normal = (magnitude << 13) + ((127u - 15u) << 23);
  const U special = (magnitude << 13) | 0x7f800000u;
  const F small = __builtin_convertvector((I)magnitude, F) * 0x1p-24f;
  const U is_small = (U)(magnitude < words(0x0400)), is_special = (U)(magnitude >= words(0x7c00));
  const U value =
      (is_small & (U)small) | (~is_small & ((is_special & special) | (~is_special & normal)));
  return (F)(value | sign);
}

// Rounded to the nearest, ties to even, as torch does.
inline U bits_of(BFloat16, F value) {
  const U bits = (U)value;
  const U is_nan = (U)((bits & 0x7fffffffu) > words(0x7f800000u));
  const U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return (is_nan & 0x7fc0u) | (~is_nan & rounded);
}

inline U bits_of(Float16, F value) {
  const U bits = (U)value, sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  const U normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below the smallest normal number: an addition rounds to whole numbers of 2^-24.
  const U small = (U)((F)magnitude + 0.5f) - 0x3f000000u;
  const U is_small = (U)(magnitude < words(0x38800000u));
  const U is_nan = (U)(magnitude > words(0x7f800000u));
  const U is_large = (U)(magnitude >= words(0x47800000u)) & ~is_nan;
  const U finite = (is_small & small) | (~is_small & normal);
  return sign | (is_nan & 0x7e00u) | (is_large & 0x7c00u) | (~is_nan & ~is_large & finite);
}

inline Lanes load(const float* from) {
  return each([&](int r) { return (F) * reinterpret_cast<const FMemory*>(from + r * WIDTH); });
}

inline void store(float* to, const Lanes& lanes) {
  for (int r = 0; r < REGISTERS; ++r) *reinterpret_cast<FMemory*>(to + r * WIDTH) = lanes.of[r];
}

template <class T>
inline Lanes load_half(const T* from) {
  return each([&](int r) {
    const H bits = *reinterpret_cast<const HMemory*>(from + r * WIDTH);
    return float_of(T{}, __builtin_convertvector(bits, U));
  });
}

template <class T>
inline void store_half(T* to, const Lanes& lanes) {
  for (int r = 0; r < REGISTERS; ++r)
    *reinterpret_cast<HMemory*>(to + r * WIDTH) =
        __builtin_convertvector(bits_of(T{}, lanes.of[r]), H);
}

// Past the caches, for memory that is not read again soon; `to` is aligned to its own size.
inline void stream(float* to, const Lanes& lanes) {
  for (int r = 0; r < REGISTERS; ++r) STREAM_FLOATS(to + r * WIDTH, lanes.of[r]);
}

template <class T>
inline void stream_half(T* to, const Lanes& lanes) {
  for (int r = 0; r < REGISTERS; ++r)
    STREAM_HALVES(to + r * WIDTH, __builtin_convertvector(bits_of(T{}, lanes.of[r]), H));
}

inline Lanes load(const BFloat16* from) { return load_half(from); }
inline Lanes load(const Float16* from) { return load_half(from); }
inline void store(BFloat16* to, const Lanes& lanes) { store_half(to, lanes); }
inline void store(Float16* to, const Lanes& lanes) { store_half(to, lanes); }
inline void store(double* to, const Lanes& lanes) {
  float values[LANES];
  store(values, lanes);
  for (int e = 0; e < LANES; ++e) to[e] = values[e];
}

inline void stream(double* to, const Lanes& lanes) { store(to, lanes); }
inline void stream(BFloat16* to, const Lanes& lanes) { stream_half(to, lanes); }
inline void stream(Float16* to, const Lanes& lanes) { stream_half(to, lanes); }

inline Lanes load(const double* from) {
  float values[LANES];
  for (int e = 0; e < LANES; ++e) values[e] = static_cast<float>(from[e]);
  return load(values);
}

// The first `count` elements, and zeros.
template <class T>
inline Lanes load_part(const T* from, int count) {
  T values[LANES]{};
  std::memcpy(values, from, static_cast<std::size_t>(count) * sizeof(T));
  return load(values);
}

template <class T>
inline void store_part(T* to, const Lanes& lanes, int count) {
  T values[LANES];
  store(values, lanes);
  std::memcpy(to, values, static_cast<std::size_t>(count) * sizeof(T));
}

#ifdef MASKED  // by instructions that leave the rest of memory alone
inline __mmask16 mask_of(int count) { return static_cast<__mmask16>((1u << count) - 1u); }

inline Lanes load_part(const float* from, int count) {
  return {{(F)_mm512_maskz_loadu_ps(mask_of(count), from)}};
}

inline void store_part(float* to, const Lanes& lanes, int count) {
  _mm512_mask_storeu_ps(to, mask_of(count), (__m512)lanes.of[0]);
}

template <class T>
inline Lanes load_half_part(const T* from, int count) {
  const H bits = (H)_mm256_maskz_loadu_epi16(mask_of(count), from);
  return {{float_of(T{}, __builtin_convertvector(bits, U))}};
}

template <class T>
inline void store_half_part(T* to, const Lanes& lanes, int count) {
  const H bits = __builtin_convertvector(bits_of(T{}, lanes.of[0]), H);
  _mm256_mask_storeu_epi16(to, mask_of(count), (__m256i)bits);
}

inline Lanes load_part(const BFloat16* from, int count) { return load_half_part(from, count); }
inline Lanes load_part(const Float16* from, int count) { return load_half_part(from, count); }
inline void store_part(BFloat16* to, const Lanes& lanes, int count) {
  store_half_part(to, lanes, count);
}
inline void store_part(Float16* to, const Lanes& lanes, int count) {
  store_half_part(to, lanes, count);
}
#endif

// Zero where the bit of a lane is not set: selected, not multiplied, for there may be a NaN.
inline Lanes selected(const Lanes& lanes, std::uint32_t bits) {
  return each([&](int r) {
    U lane{};
    for (int e = 0; e < WIDTH; ++e) lane[e] = static_cast<std::uint32_t>(r * WIDTH + e);
    const U all = U{} - ((words(bits) >> lane) & 1u);
    return (F)((U)lanes.of[r] & all);
  });
}

// The sum over all lanes in float64, as a tree.
inline double sum_of(const float* lanes) {
  typedef float Half __attribute__((vector_size(LANES / 2 * 4), aligned(4), may_alias));
  typedef double Sums __attribute__((vector_size(LANES / 2 * 8)));
  const Sums s = __builtin_convertvector(*reinterpret_cast<const Half*>(lanes), Sums) +
                 __builtin_convertvector(*reinterpret_cast<const Half*>(lanes + LANES / 2), Sums);
  return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
}
