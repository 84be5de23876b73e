// What the decoder (tests/ptx/decode.py) and the interpreter agree on: a program is an array of
// `Instruction`; registers are numbers, and every operand is one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace ptx {

using Mask = std::uint32_t;  // a bit for each lane of a warp
constexpr int LANES = 32;

#define PTX_OPERATIONS(X)                                                                          \
  X(MOV) X(PACK) X(UNPACK) X(SELP) X(SETP) X(CVT) X(CVT_PAIR)                                      \
  X(ADD) X(SUB) X(MUL) X(MUL_HI) X(MUL_WIDE) X(MAD) X(MAD_WIDE) X(FMA) X(ADD_MIXED)                \
  X(ADD_CARRY) X(MAD_CARRY) X(DIV) X(REM) X(MIN) X(MAX) X(ABS) X(NEG) X(SQRT) X(RCP) X(RCP_HIGH)   \
  X(AND) X(OR) X(XOR) X(NOT) X(SHL) X(SHR) X(FUNNEL) X(BFE) X(BFI) X(CLZ) X(POPC) X(PRMT)          \
  X(LD) X(ST) X(ATOM_ADD) X(FENCE) X(LDMATRIX) X(STMATRIX)                                         \
  X(BRA) X(EXIT) X(BAR) X(WARP_BAR) X(SHFL) X(REDUX) X(TRAP) X(NOP)

#define PTX_TYPES(X)                                                                               \
  X(u8) X(u16) X(u32) X(u64) X(s8) X(s16) X(s32) X(s64) X(f16) X(bf16) X(f32) X(f64) X(pred)       \
  X(f16x2) X(bf16x2) X(f32x2)

#define PTX_ENUMERATOR(name) name,
enum Operation : std::int32_t { PTX_OPERATIONS(PTX_ENUMERATOR) OPERATIONS };
namespace type {
enum Type : std::int32_t { PTX_TYPES(PTX_ENUMERATOR) TYPES };
}
using type::Type;
#undef PTX_ENUMERATOR

// The flags of an instruction; which of them count depends on its operation.
enum Flag : std::int32_t {
  CARRY_IN = 1,
  CARRY_OUT = 2,
  SUBTRACT = 4,
  HIGH_HALF = 8,
  RIGHT = 1,     // of FUNNEL
  CLAMP = 2,     // of FUNNEL
  ALIGNED = 1,   // of BAR
  TRANSPOSED = 1,  // of LDMATRIX and STMATRIX
  FLUSH = 1,       // of ABS: what is subnormal becomes 0
  CONSTANT = 1,  // of LD: memory that nobody writes during the launch (.nc)
  ACQUIRE = 2,   // of LD and ATOM_ADD
  RELEASE = 4,   // of ATOM_ADD and ST
};
enum Rounding : std::int32_t { TO_TYPE, TO_NEAREST_INTEGER, TOWARDS_ZERO, DOWN, UP };
enum Comparison : std::int32_t {
  EQ, NE, LT, LE, GT, GE, EQU, NEU, LTU, LEU, GTU, GEU, NUM, NAN_
};
enum Combination : std::int32_t { COMBINE_AND, COMBINE_OR, COMBINE_XOR, NEGATED = 256 };
enum ShuffleMode : std::int32_t { SHUFFLE_UP, SHUFFLE_DOWN, SHUFFLE_XOR, SHUFFLE_INDEX };
enum Reduction : std::int32_t { SUM, MINIMUM, MAXIMUM, ALL, ANY, PARITY };

enum Space : std::int32_t { GLOBAL, SHARED, LOCAL, PARAMETER, GENERIC };

struct Instruction {
  std::int32_t operation, type;
  std::int32_t second;            // CVT: the source's type; LD, ST: the space
  std::int32_t flags;             // of Flag, Rounding, Comparison, ShuffleMode or Reduction
  std::int32_t guard, unless;     // a predicate or -1; whether it is negated
  std::int32_t results, sources;  // how many there are
  std::int32_t result[8], source[8];
  std::int64_t immediate;         // LD, ST: offset; SETP: of Combination
  std::int32_t target, padding;   // BRA
};

// A register with a value that is known before the program begins.
struct Constant {
  enum Kind : std::int32_t { VALUE, SPECIAL, LOCAL_ADDRESS, PARAMETER_ADDRESS };
  std::int32_t reg, kind;
  std::uint64_t value;
};
enum Special : std::int32_t {
  TID_X, TID_Y, TID_Z, NTID_X, NTID_Y, NTID_Z, CTAID_X, CTAID_Y, CTAID_Z, NCTAID_X, NCTAID_Y,
  NCTAID_Z, LANEID, WARPID, ENVREG1, ENVREG2
};

struct Range {
  std::uint64_t begin, end;
};

// One launch, as the host describes it.
struct Job {
  const Instruction* code;
  const Constant* constants;
  const std::uint8_t* parameters;
  const Range* ranges;              // sorted, disjoint: memory that the kernel may access
  std::uint64_t (*counts)[3];       // of each instruction, written: requests, sectors, least sectors
  std::uint64_t limit, executed;    // instructions of warps; the second is written
  std::int32_t code_size, constant_count, registers, range_count;
  std::int32_t grid[3], block[3];
  std::int32_t shared_bytes, local_bytes, parameter_bytes;
  std::int32_t cooperative, resident, quantum, seed, padding;
};

// What is wrong with a program. The first example of each place is kept.
enum Fault : int {
  OUT_OF_BOUNDS, MISALIGNED, RACE_IN_BLOCK, RACE_IN_WARP, RACE_OF_BLOCKS, UNWRITTEN_SHARED,
  CONSTANT_WRITTEN, DIVERGENT_BARRIER, BARRIER_AFTER_EXIT, ABSENT_LANE, DEADLOCK, TRAPPED, TOO_LONG,
  UNSUPPORTED
};
struct Report {
  Fault fault;
  int at, other;  // instructions; -1: none
  long count;
  std::string example;
};

inline int size_of(int type) {
  switch (type) {
    case type::u8: case type::s8: return 1;
    case type::u16: case type::s16: case type::f16: case type::bf16: return 2;
    case type::u64: case type::s64: case type::f64: case type::f32x2: return 8;
    default: return 4;
  }
}

inline bool is_signed(int type) { return type >= type::s8 && type <= type::s64; }
inline bool is_floating(int type) { return type >= type::f16 && type <= type::f64; }

template <class F>
inline void for_lanes(Mask mask, F run) {
  if (mask == ~Mask{0}) {
    for (int lane = 0; lane < LANES; ++lane) run(lane);
  } else {
    for (; mask; mask &= mask - 1) run(__builtin_ctz(mask));
  }
}

}  // namespace ptx
