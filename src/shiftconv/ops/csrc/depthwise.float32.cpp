// The depthwise convolution of float32 maps.
#include "depthwise_run.h"

namespace shiftconv {

template void run_sum<float>(const DepthwiseCall&, const std::optional<Tensor>&, const Tensor&);
template void run_each<float>(const DepthwiseCall&, const std::vector<Tensor>&);

}  // namespace shiftconv
