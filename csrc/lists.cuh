#pragma once

#include "gramian.cuh"

namespace gcond {

// `addresses` holds the tensors of the first list, then those of the second; the segments' offsets
// are not used, the sizes are.
void lists(const Place& place, const Gramian& arguments, const Addresses& addresses,
           const Totals& totals);

}  // namespace gcond
