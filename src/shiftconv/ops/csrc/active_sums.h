// Gradients of the offsets of one channel of one image. All derivatives are weighted sums of few correlations of the
// incoming gradient and the input, one for each corner of the cell that is interpolated in.
#pragma once

#include "active_planes.h"

namespace shiftconv {

template <class W>
class ActiveSums {
 public:
  ActiveSums(const ActiveMap<W>& map) : map_(map) {}

  void select(int64_t channel) {
    channel_ = channel;
    plan_ = {&map_.d[channel], &map_.h[channel], &map_.w[channel]};
    weight_ = {map_.d.weights(channel), map_.h.weights(channel), map_.w.weights(channel)};
  }

  // Writes one derivative per axis, outermost first; those of absent axes mean nothing.
  void run(const W* grad, const W* x, bool guarded, double* derivative) {
    const auto& [d, h, w] = plan_;
    corner_ = {};
    for (int64_t z = 0; z < d->count; ++z)
      d->visit(z, [&](int64_t source, int i) {
        const W* const g = grad + z * h->count * w->count;
        const W* const slice = x + source * h->size * w->size;
        if (map_.plain && map_.zeros)
          correlate_slices(g, slice, guarded, corner_[i].data());
        else
          correlate_rows(g, slice, guarded, corner_[i].data());
      });
    derive(derivative);
  }

 private:
  void correlate_slices(const W* grad, const W* x, bool guarded, double (*sums)[2]) const {
    const AxisPlan &h = *plan_[1], &w = *plan_[2];
    const int64_t area = h.count * w.count;
    std::array<Source<W>, 2> source;
    for (int b = 0; b < h.taps(); ++b) {
      const int64_t distance = (h.delta() + b) * w.count + w.delta();
      source[b] = {x + distance, -distance, area - distance, 1};
    }
    if (h.taps() == 2)
      correlate<W, 2>(grad, area, source.data(), map_.columns(channel_), guarded, sums);
    else
      correlate<W, 1>(grad, area, source.data(), map_.columns(channel_), guarded, sums);
  }

  void correlate_rows(const W* grad, const W* x, bool guarded, double (*sums)[2]) const {
    const AxisPlan &h = *plan_[1], &w = *plan_[2];
    const int64_t count = w.end - w.begin;
    for (int64_t y = 0; y < h.count; ++y, grad += w.count)
      h.visit(y, [&](int64_t source, int j) {
        const W* const row = x + source * w.size;
        const auto add = [&](int64_t position) {
          w.visit(position, [&](int64_t at, int k) {
            sums[j][k] += static_cast<double>(grad[position] * row[at]);
          });
        };
        w.visit_border(add);
        if (w.step() > 1) {
          for (int64_t position = w.begin; position < w.end; ++position) add(position);
        } else if (count > 0) {
          const Source<W> inside{row + w.begin + w.delta(), 0, count + 1, 1};
          correlate<W, 1>(grad + w.begin, count, &inside, Columns<W>::all(2), guarded, sums + j);
        }
      });
  }

  void derive(double* derivative) const {
    for (int axis = 0; axis < 3; ++axis) {
      double sum = 0;
      for (int corner = 0; corner < 8; ++corner) {
        const std::array<int, 3> tap{corner >> 2 & 1, corner >> 1 & 1, corner & 1};
        double weight = tap[axis] == 0 ? 1 : -1;
        bool exists = true;
        for (int k = 0; k < 3; ++k) {
          exists = exists && tap[k] < plan_[k]->taps();
          if (k != axis) weight *= weight_[k][tap[k]];
        }
        // A corner of no weight may be infinite.
        if (exists && weight != 0) sum += weight * corner_[tap[0]][tap[1]][tap[2]];
      }
      derivative[axis] = sum;
    }
  }

  const ActiveMap<W>& map_;
  int64_t channel_ = 0;
  std::array<const AxisPlan*, 3> plan_{};
  std::array<std::array<W, 2>, 3> weight_;
  std::array<std::array<double[2], 2>, 2> corner_;  // by taps
};

}  // namespace shiftconv
