// The depthwise convolution of bfloat16 maps.
#include <torch/headeronly/util/BFloat16.h>

#include "depthwise_run.h"

namespace shiftconv {

template void run_sum<c10::BFloat16>(const DepthwiseCall&, const std::optional<Tensor>&, const Tensor&);
template void run_each<c10::BFloat16>(const DepthwiseCall&, const std::vector<Tensor>&);

}  // namespace shiftconv
