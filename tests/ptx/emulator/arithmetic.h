// Instructions that work on registers alone. Every function returns false for an operation that it
// does not have: the decoder asks before a program runs.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <type_traits>

#include "program.h"

namespace ptx {

using u8 = std::uint8_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;
using s32 = std::int32_t;
using s64 = std::int64_t;
using u128 = unsigned __int128;
using s128 = __int128;

// The registers of a warp: 64 bits for each lane, of which a type uses the lowest.
struct Registers {
  u64* values;  // [register][lane]

  u64& at(int reg, int lane) const { return values[static_cast<std::size_t>(reg) * LANES + lane]; }
  template <class T>
  T get(int reg, int lane) const {
    T value;
    std::memcpy(&value, &at(reg, lane), sizeof value);
    return value;
  }
  template <class T>
  void put(int reg, int lane, T value) const {
    u64 bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    at(reg, lane) = bits;
  }
  bool is_true(int reg, int lane) const { return at(reg, lane) & 1; }
};

template <class To, class From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "the same number of bits");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline float from_bf16(u16 bits) { return bits_as<float>(static_cast<u32>(bits) << 16); }
inline u16 to_bf16(float value) {
  const u32 bits = bits_as<u32>(value);
  if (std::isnan(value)) return 0x7fff;
  return static_cast<u16>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float from_f16(u16 bits) { return static_cast<float>(bits_as<_Float16>(bits)); }
inline u16 to_f16(float value) {
  return std::isnan(value) ? 0x7fff : bits_as<u16>(static_cast<_Float16>(value));
}

struct FloatPair {
  float low, high;
};

template <class T, class F>
bool unary(const Registers& r, const Instruction& i, Mask mask, F f) {
  for_lanes(mask, [&](int l) { r.put<T>(i.result[0], l, f(r.get<T>(i.source[0], l))); });
  return true;
}

template <class T, class F>
bool binary(const Registers& r, const Instruction& i, Mask mask, F f) {
  for_lanes(mask, [&](int l) {
    r.put<T>(i.result[0], l, f(r.get<T>(i.source[0], l), r.get<T>(i.source[1], l)));
  });
  return true;
}

template <class T, class Wide = T, class F>
bool ternary(const Registers& r, const Instruction& i, Mask mask, F f) {
  for_lanes(mask, [&](int l) {
    r.put<Wide>(i.result[0], l,
                f(r.get<T>(i.source[0], l), r.get<T>(i.source[1], l), r.get<Wide>(i.source[2], l)));
  });
  return true;
}

template <class T>
bool compare(int comparison, T a, T b) {
  const bool unordered = a != a || b != b;
  switch (comparison) {
    case EQ: return a == b;
    case NE: return !unordered && a != b;
    case LT: return a < b;
    case LE: return a <= b;
    case GT: return a > b;
    case GE: return a >= b;
    case EQU: return unordered || a == b;
    case NEU: return unordered || a != b;
    case LTU: return unordered || a < b;
    case LEU: return unordered || a <= b;
    case GTU: return unordered || a > b;
    case GEU: return unordered || a >= b;
    case NUM: return !unordered;
    default: return unordered;
  }
}

template <class T>
bool set_predicate(const Registers& r, const Instruction& i, Mask mask) {
  for_lanes(mask, [&](int l) {
    bool value = compare<T>(i.flags, r.get<T>(i.source[0], l), r.get<T>(i.source[1], l));
    if (i.sources == 3) {
      const bool other = r.is_true(i.source[2], l) != ((i.immediate & NEGATED) != 0);
      switch (i.immediate & ~NEGATED) {
        case COMBINE_AND: value = value && other; break;
        case COMBINE_OR: value = value || other; break;
        default: value = value != other;
      }
    }
    r.put<u64>(i.result[0], l, value);
    if (i.results > 1) r.put<u64>(i.result[1], l, !value);
  });
  return true;
}

// The product of two integers, twice as wide.
template <class T>
auto wide_product(T a, T b) {
  using Wide = std::conditional_t<std::is_signed_v<T>, s128, u128>;
  return static_cast<Wide>(a) * static_cast<Wide>(b);
}

template <class T, class Wide>
bool widening(const Registers& r, const Instruction& i, Mask mask) {
  if (i.operation == MAD_WIDE)
    return ternary<T, Wide>(r, i, mask, [](T a, T b, Wide c) {
      return static_cast<Wide>(static_cast<u64>(wide_product(a, b)) + static_cast<u64>(c));
    });
  for_lanes(mask, [&](int l) {
    r.put<Wide>(i.result[0], l, static_cast<Wide>(wide_product(r.get<T>(i.source[0], l),
                                                               r.get<T>(i.source[1], l))));
  });
  return true;
}

inline bool multiply_wide(const Registers& r, const Instruction& i, Mask mask) {
  switch (i.type) {
    case type::u16: return widening<u16, u32>(r, i, mask);
    case type::s16: return widening<std::int16_t, s32>(r, i, mask);
    case type::u32: return widening<u32, u64>(r, i, mask);
    case type::s32: return widening<s32, s64>(r, i, mask);
    default: return false;
  }
}

template <class T>
T extract_bits(T value, u32 position, u32 length) {
  constexpr u32 BITS = sizeof(T) * 8;
  using U = std::make_unsigned_t<T>;
  position &= 255;
  length &= 255;
  if (length == 0) return 0;
  const U sign = std::is_signed_v<T> && value < 0 ? ~U{0} : 0;
  const U moved = position >= BITS ? sign : static_cast<U>(value >> position);
  if (length >= BITS) return static_cast<T>(moved);
  const U kept = (U{1} << length) - 1;
  const u32 top = std::min(position + length - 1, BITS - 1);
  const bool extends = std::is_signed_v<T> && (static_cast<U>(value) >> top & 1);
  return static_cast<T>((moved & kept) | (extends ? ~kept : 0));
}

template <class T>
bool bit_fields(const Registers& r, const Instruction& i, Mask mask) {
  using U = std::make_unsigned_t<T>;
  constexpr u32 BITS = sizeof(T) * 8;
  for_lanes(mask, [&](int l) {
    const auto number = [&](int source) { return r.get<u32>(i.source[source], l); };
    if (i.operation == BFE) {
      r.put<T>(i.result[0], l, extract_bits<T>(r.get<T>(i.source[0], l), number(1), number(2)));
      return;
    }
    const U inserted = r.get<U>(i.source[0], l), into = r.get<U>(i.source[1], l);
    const u32 position = number(2) & 255, length = number(3) & 255;
    const U field = length >= BITS ? ~U{0} : (U{1} << length) - 1;
    r.put<U>(i.result[0], l, position >= BITS
                                 ? into
                                 : (into & ~(field << position)) | (inserted & field) << position);
  });
  return true;
}

template <class T>
T shifted_right(T value, u32 by) {
  constexpr u32 BITS = sizeof(T) * 8;
  if (by >= BITS) return std::is_signed_v<T> && value < 0 ? static_cast<T>(-1) : T{0};
  return static_cast<T>(value >> by);
}

template <class T>
bool shifts(const Registers& r, const Instruction& i, Mask mask) {
  using U = std::make_unsigned_t<T>;
  for_lanes(mask, [&](int l) {
    const T value = r.get<T>(i.source[0], l);
    const u32 by = r.get<u32>(i.source[1], l);
    if (i.operation == SHR)
      r.put<T>(i.result[0], l, shifted_right(value, by));
    else
      r.put<U>(i.result[0], l, by >= sizeof(T) * 8 ? U{0} : static_cast<U>(static_cast<U>(value) << by));
  });
  return true;
}

// Division by zero gives all bits set on a GPU.
template <class T>
T quotient(T a, T b) {
  if (b == 0) return static_cast<T>(-1);
  if (std::is_signed_v<T> && b == static_cast<T>(-1)) return static_cast<T>(0 - static_cast<u64>(a));
  return static_cast<T>(a / b);
}

template <class T>
bool integers(const Registers& r, const Instruction& i, Mask m) {
  using U = std::make_unsigned_t<T>;
  switch (i.operation) {
    case ADD: return binary<U>(r, i, m, [](U a, U b) { return static_cast<U>(a + b); });
    case SUB: return binary<U>(r, i, m, [](U a, U b) { return static_cast<U>(a - b); });
    case MUL: return binary<U>(r, i, m, [](U a, U b) { return static_cast<U>(u64{a} * b); });
    case MAD: return ternary<U>(r, i, m, [](U a, U b, U c) { return static_cast<U>(u64{a} * b + c); });
    case MUL_HI:
      return binary<T>(r, i, m, [](T a, T b) {
        return static_cast<T>(wide_product(a, b) >> sizeof(T) * 8);
      });
    case DIV: return binary<T>(r, i, m, quotient<T>);
    case REM:
      return binary<T>(r, i, m, [](T a, T b) {
        return b == 0 ? a : static_cast<T>(static_cast<u64>(a) - static_cast<u64>(quotient(a, b)) * static_cast<u64>(b));
      });
    case MIN: return binary<T>(r, i, m, [](T a, T b) { return std::min(a, b); });
    case MAX: return binary<T>(r, i, m, [](T a, T b) { return std::max(a, b); });
    case ABS: return unary<T>(r, i, m, [](T a) { return static_cast<T>(a < 0 ? 0 - static_cast<u64>(a) : a); });
    case NEG: return unary<U>(r, i, m, [](U a) { return static_cast<U>(0 - u64{a}); });
    case SHL: case SHR: return shifts<T>(r, i, m);
    case SETP: return set_predicate<T>(r, i, m);
    case BFE: case BFI: return bit_fields<T>(r, i, m);
    default: return false;
  }
}

// Of a number and a NaN the number; -0 is below +0.
template <class T>
T smaller(T a, T b) {
  if (std::isnan(a)) return b;
  if (std::isnan(b)) return a;
  return a == b ? (std::signbit(a) ? a : b) : std::min(a, b);
}
template <class T>
T larger(T a, T b) {
  return -smaller<T>(-a, -b);
}

template <class T>
bool floats(const Registers& r, const Instruction& i, Mask m) {
  switch (i.operation) {
    case ADD: return binary<T>(r, i, m, [](T a, T b) { return a + b; });
    case SUB: return binary<T>(r, i, m, [](T a, T b) { return a - b; });
    case MUL: return binary<T>(r, i, m, [](T a, T b) { return a * b; });
    case DIV: return binary<T>(r, i, m, [](T a, T b) { return a / b; });
    case FMA: return ternary<T>(r, i, m, [](T a, T b, T c) { return std::fma(a, b, c); });
    case MIN: return binary<T>(r, i, m, smaller<T>);
    case MAX: return binary<T>(r, i, m, larger<T>);
    case ABS:
      return unary<T>(r, i, m, [flush = i.flags & FLUSH](T a) {
        return flush && std::fabs(a) < std::numeric_limits<T>::min() ? T{0} : std::fabs(a);
      });
    case NEG: return unary<T>(r, i, m, [](T a) { return -a; });
    case SQRT: return unary<T>(r, i, m, [](T a) { return std::sqrt(a); });
    case RCP: return unary<T>(r, i, m, [](T a) { return 1 / a; });
    case SETP: return set_predicate<T>(r, i, m);
    case RCP_HIGH:  // 20 bits of 1 / a, which Newton's steps refine; the lower half is zero
      if (!std::is_same_v<T, double>) return false;
      for_lanes(m, [&](int l) {
        const double inverse = 1 / r.get<double>(i.source[0], l);
        r.put<u64>(i.result[0], l, bits_as<u64>(inverse) & ~u64{0xffffffff});
      });
      return true;
    default: return false;
  }
}

template <class F>
FloatPair in_pairs(FloatPair a, FloatPair b, F f) {
  return {f(a.low, b.low), f(a.high, b.high)};
}

inline bool float_pairs(const Registers& r, const Instruction& i, Mask m) {
  using P = FloatPair;
  const auto add = [](float a, float b) { return a + b; };
  const auto multiply = [](float a, float b) { return a * b; };
  switch (i.operation) {
    case ADD: return binary<P>(r, i, m, [&](P a, P b) { return in_pairs(a, b, add); });
    case SUB: return binary<P>(r, i, m, [&](P a, P b) { return in_pairs(a, {-b.low, -b.high}, add); });
    case MUL: return binary<P>(r, i, m, [&](P a, P b) { return in_pairs(a, b, multiply); });
    case FMA:
      return ternary<P>(r, i, m, [](P a, P b, P c) {
        return P{std::fma(a.low, b.low, c.low), std::fma(a.high, b.high, c.high)};
      });
    default: return false;
  }
}

// A value of any type as the widest of its kind.
inline double floating(const Registers& r, int reg, int lane, int type) {
  switch (type) {
    case type::f16: return from_f16(r.get<u16>(reg, lane));
    case type::bf16: return from_bf16(r.get<u16>(reg, lane));
    case type::f32: return r.get<float>(reg, lane);
    default: return r.get<double>(reg, lane);
  }
}

inline u64 extended(u64 bits, int type) {
  const int unused = 64 - 8 * size_of(type);
  if (is_signed(type)) return static_cast<u64>(static_cast<s64>(bits << unused) >> unused);
  return bits << unused >> unused;
}

inline void put_floating(const Registers& r, int reg, int lane, int type, double value) {
  switch (type) {
    case type::f16: return r.put<u16>(reg, lane, to_f16(static_cast<float>(value)));
    case type::bf16: return r.put<u16>(reg, lane, to_bf16(static_cast<float>(value)));
    case type::f32: return r.put<float>(reg, lane, static_cast<float>(value));
    default: return r.put<double>(reg, lane, value);
  }
}

inline double rounded(double value, int rounding) {
  switch (rounding) {
    case TO_NEAREST_INTEGER: return std::nearbyint(value);
    case DOWN: return std::floor(value);
    case UP: return std::ceil(value);
    case TOWARDS_ZERO: return std::trunc(value);
    default: return value;
  }
}

// Saturates, as a GPU does; NaN becomes 0.
template <class T>
u64 saturated(double value) {
  using Limits = std::numeric_limits<T>;
  if (std::isnan(value)) return 0;
  if (value >= std::ldexp(1.0, Limits::digits)) return static_cast<u64>(Limits::max());
  if (value <= static_cast<double>(Limits::min())) return static_cast<u64>(Limits::min());
  return static_cast<u64>(static_cast<T>(value));
}

inline u64 to_integer(double value, int type) {
  switch (type) {
    case type::u8: return saturated<u8>(value);
    case type::u16: return saturated<u16>(value);
    case type::u32: return saturated<u32>(value);
    case type::u64: return saturated<u64>(value);
    case type::s8: return saturated<std::int8_t>(value);
    case type::s16: return saturated<std::int16_t>(value);
    case type::s32: return saturated<s32>(value);
    default: return saturated<s64>(value);
  }
}

inline void integer_to_floating(const Registers& r, const Instruction& i, int lane) {
  const u64 bits = extended(r.at(i.source[0], lane), i.second);
  const auto put = [&](auto value) {  // rounded once, to the type of the result
    if (i.type == type::f64)
      r.put<double>(i.result[0], lane, static_cast<double>(value));
    else
      r.put<float>(i.result[0], lane, static_cast<float>(value));
  };
  if (is_signed(i.second))
    put(static_cast<s64>(bits));
  else
    put(bits);
}

inline bool convert(const Registers& r, const Instruction& i, Mask mask) {
  const bool to_float = is_floating(i.type), from_float = is_floating(i.second);
  if (to_float && !from_float && size_of(i.type) == 2) return false;
  // Through float32 a float64 would be rounded twice.
  if (to_float && size_of(i.type) == 2 && i.second == type::f64) return false;
  for_lanes(mask, [&](int l) {
    if (to_float && from_float)
      put_floating(r, i.result[0], l, i.type, rounded(floating(r, i.source[0], l, i.second), i.flags));
    else if (to_float)
      integer_to_floating(r, i, l);
    else if (from_float)
      r.at(i.result[0], l) =
          to_integer(rounded(floating(r, i.source[0], l, i.second), i.flags), i.type);
    else
      r.at(i.result[0], l) = extended(extended(r.at(i.source[0], l), i.second), i.type);
  });
  return true;
}

// The lowest bits of a register, as many as a type has.
inline u64 low_bits(u64 bits, int type) { return extended(bits, type & 3); }

inline bool add_with_carry(const Registers& r, const Instruction& i, Mask mask, int carry_register) {
  const int bits = size_of(i.type) * 8;
  for_lanes(mask, [&](int l) {
    const u128 a = low_bits(r.at(i.source[0], l), i.type), b = low_bits(r.at(i.source[1], l), i.type);
    u64& carry = r.at(carry_register, l);
    const u128 in = i.flags & CARRY_IN ? carry & 1 : 0;
    const u128 sum = i.flags & SUBTRACT ? a - b - in : a + b + in;
    if (i.flags & CARRY_OUT) carry = (sum >> bits & 1) != 0;
    r.at(i.result[0], l) = low_bits(static_cast<u64>(sum), i.type);
  });
  return true;
}

inline bool multiply_with_carry(const Registers& r, const Instruction& i, Mask mask, int carry_register) {
  if (size_of(i.type) != 4) return false;
  for_lanes(mask, [&](int l) {
    const u64 product = u64{r.get<u32>(i.source[0], l)} * r.get<u32>(i.source[1], l);
    const u64 half = i.flags & HIGH_HALF ? product >> 32 : static_cast<u32>(product);
    u64& carry = r.at(carry_register, l);
    const u64 sum = half + r.get<u32>(i.source[2], l) + (i.flags & CARRY_IN ? carry & 1 : 0);
    if (i.flags & CARRY_OUT) carry = sum >> 32;
    r.put<u32>(i.result[0], l, static_cast<u32>(sum));
  });
  return true;
}

inline u32 permuted(u64 bytes, u32 selection) {
  u32 result = 0;
  for (int place = 0; place < 4; ++place) {
    const u32 which = selection >> 4 * place & 15;
    u32 byte = bytes >> 8 * (which & 7) & 255;
    if (which & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << 8 * place;
  }
  return result;
}

// Operations on bits, of a size rather than a type.
inline bool bitwise(const Registers& r, const Instruction& i, Mask mask) {
  const auto source = [&](int n, int l) -> u64& { return r.at(i.source[n], l); };
  const auto pair = [&](int l) { return source(1, l) << 32 | static_cast<u32>(source(0, l)); };
  const auto set = [&](auto value) {
    for_lanes(mask, [&](int l) { r.at(i.result[0], l) = value(l); });
    return true;
  };
  switch (i.operation) {
    case MOV: return set([&](int l) { return source(0, l); });
    case AND: return set([&](int l) { return source(0, l) & source(1, l); });
    case OR: return set([&](int l) { return source(0, l) | source(1, l); });
    case XOR: return set([&](int l) { return source(0, l) ^ source(1, l); });
    case NOT:
      return set([&](int l) {
        return i.type == type::pred ? ~source(0, l) & 1 : low_bits(~source(0, l), i.type);
      });
    case SELP: return set([&](int l) { return source(source(2, l) & 1 ? 0 : 1, l); });
    case FUNNEL:
      return set([&](int l) -> u64 {
        const u32 given = static_cast<u32>(source(2, l));
        const u32 by = i.flags & CLAMP ? std::min(given, 32u) : given & 31;
        return static_cast<u32>(i.flags & RIGHT ? pair(l) >> by : pair(l) << by >> 32);
      });
    case PRMT: return set([&](int l) -> u64 { return permuted(pair(l), static_cast<u32>(source(2, l))); });
    case POPC:
      return set([&](int l) -> u64 { return __builtin_popcountll(low_bits(source(0, l), i.type)); });
    case CLZ:
      return set([&](int l) -> u64 {
        const u64 bits = low_bits(source(0, l), i.type);
        const int size = size_of(i.type) * 8;
        return bits == 0 ? size : __builtin_clzll(bits) - (64 - size);
      });
    default: return false;
  }
}

inline bool pack(const Registers& r, const Instruction& i, Mask mask) {
  const int count = i.operation == PACK ? i.sources : i.results;
  const int bits = size_of(i.type) * 8 / count;
  const u64 part = (u64{1} << bits) - 1;
  for_lanes(mask, [&](int l) {
    if (i.operation == UNPACK) {
      const u64 value = r.at(i.source[0], l);
      for (int n = 0; n < count; ++n)
        if (i.result[n] >= 0) r.at(i.result[n], l) = value >> bits * n & part;
      return;
    }
    u64 value = 0;
    for (int n = 0; n < count; ++n) value |= (r.at(i.source[n], l) & part) << bits * n;
    r.at(i.result[0], l) = value;
  });
  return true;
}

// Two float32 as one register of two halves, the first in the upper.
inline bool convert_pair(const Registers& r, const Instruction& i, Mask mask) {
  const auto half = i.type == type::f16x2 ? to_f16 : to_bf16;
  for_lanes(mask, [&](int l) {
    const u32 high = half(r.get<float>(i.source[0], l)), low = half(r.get<float>(i.source[1], l));
    r.put<u32>(i.result[0], l, high << 16 | low);
  });
  return true;
}

// A half is added to a float32, rounded once.
inline bool add_mixed(const Registers& r, const Instruction& i, Mask mask) {
  for_lanes(mask, [&](int l) {
    const double sum = floating(r, i.source[0], l, i.second) + r.get<float>(i.source[1], l);
    r.put<float>(i.result[0], l, static_cast<float>(sum));
  });
  return true;
}

inline bool by_type(const Registers& r, const Instruction& i, Mask mask) {
  switch (i.type) {
    case type::u16: return integers<u16>(r, i, mask);
    case type::u32: return integers<u32>(r, i, mask);
    case type::u64: return integers<u64>(r, i, mask);
    case type::s16: return integers<std::int16_t>(r, i, mask);
    case type::s32: return integers<s32>(r, i, mask);
    case type::s64: return integers<s64>(r, i, mask);
    case type::f32: return floats<float>(r, i, mask);
    case type::f64: return floats<double>(r, i, mask);
    case type::f32x2: return float_pairs(r, i, mask);
    default: return false;
  }
}

// Runs an instruction that works on registers; false where there is none of that type.
inline bool calculate(const Registers& r, const Instruction& i, Mask mask, int carry_register) {
  switch (i.operation) {
    case MOV: case AND: case OR: case XOR: case NOT: case SELP: case FUNNEL: case PRMT: case POPC:
    case CLZ: return bitwise(r, i, mask);
    case PACK: case UNPACK: return pack(r, i, mask);
    case CVT: return convert(r, i, mask);
    case CVT_PAIR: return convert_pair(r, i, mask);
    case ADD_MIXED: return add_mixed(r, i, mask);
    case MUL_WIDE: case MAD_WIDE: return multiply_wide(r, i, mask);
    case ADD_CARRY: return add_with_carry(r, i, mask, carry_register);
    case MAD_CARRY: return multiply_with_carry(r, i, mask, carry_register);
    default: return by_type(r, i, mask);
  }
}

}  // namespace ptx
