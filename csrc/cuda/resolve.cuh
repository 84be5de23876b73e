// resolve: gramian, arbitrate and combine in one launch.
#pragma once

#include "arbitrate.cuh"
#include "combine.cuh"
#include "gramian.cuh"

namespace gcond {

struct ResolveArguments {
  GramianArguments gramian;
  ArbitrateArguments arbitrate;
  CombineArguments combine;
  FactorArguments factors;  // its factors are null where all are 1
  double max_norm;          // read where norms are needed
};

void resolve(const Stream& stream, const ResolveArguments& arguments, const TensorList& outputs);

}  // namespace gcond
