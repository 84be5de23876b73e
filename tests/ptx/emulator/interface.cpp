// What Python calls, as plain C.
#include <cstdio>

#include "machine.h"

namespace {

int place_in(const char* const* names, int count, const char* name) {
  for (int n = 0; n < count; ++n)
    if (std::strcmp(names[n], name) == 0) return n;
  return -1;
}

#define PTX_NAME(name) #name,
const char* const OPERATION_NAMES[] = {PTX_OPERATIONS(PTX_NAME)};
const char* const TYPE_NAMES[] = {PTX_TYPES(PTX_NAME)};

}  // namespace

extern "C" {

// The number of an operation or of a type; -1 where there is none of that name.
int ptx_operation(const char* name) { return place_in(OPERATION_NAMES, ptx::OPERATIONS, name); }
int ptx_type(const char* name) { return place_in(TYPE_NAMES, ptx::type::TYPES, name); }

// Whether an instruction has a meaning: a type may lack an operation.
int ptx_is_supported(const ptx::Instruction* instruction) {
  if (instruction->operation >= ptx::LD && instruction->operation <= ptx::NOP) return 1;
  ptx::u64 unused = 0;
  return ptx::calculate({&unused}, *instruction, 0, 0);
}

// Runs a launch. Returns whether it ended; writes a line for each report: fault, instruction, other
// instruction, count and example, with tabs between.
int ptx_run(ptx::Job* job, char* reports, int size) {
  ptx::Machine machine(*job);
  const bool ended = machine.run();
  std::string text;
  for (const ptx::Report& r : machine.reports())
    text += std::to_string(r.fault) + '\t' + std::to_string(r.at) + '\t' + std::to_string(r.other) +
            '\t' + std::to_string(r.count) + '\t' + r.example + '\n';
  std::snprintf(reports, size, "%s", text.c_str());
  job->executed = machine.executed();
  return ended;
}
}
