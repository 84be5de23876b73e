// resolve: gramian, arbitration and combine as one launch.
#pragma once

#include "arbitrate.cuh"
#include "combine.cuh"
#include "gramian.cuh"

namespace gcond {

struct Resolve {
  Gramian gramian;
  Totals totals;
  Arbitrate arbitrate;
  Combine combine;
  Factors factors;  // with or without norms; no factors: there is nothing to find
  double max_norm;  // infinite where there is none
};

void resolve(const Place& place, const Resolve& arguments, const Addresses& outputs);

}  // namespace gcond
