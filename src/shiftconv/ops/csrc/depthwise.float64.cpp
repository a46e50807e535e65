// The depthwise convolution of float64 maps.
#include "depthwise_run.h"

namespace shiftconv {

template void run_sum<double>(const DepthwiseCall&, const std::optional<Tensor>&, const Tensor&);
template void run_each<double>(const DepthwiseCall&, const std::vector<Tensor>&);

}  // namespace shiftconv
