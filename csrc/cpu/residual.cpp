#include <algorithm>

#include "isa.h"
#include "team.h"

namespace nfk {
namespace cpu {
namespace NFK_ISA {
namespace {

template <class T>
struct View {
  using Acc = typename Accumulate<T>::type;
  const ResidualTensor& t;

  const T* in(const void* data) const { return static_cast<const T*>(data); }
  T* out(void* data) const { return static_cast<T*>(data); }
  const Acc* factor() const { return static_cast<const Acc*>(t.factor); }
  Acc* sums() const { return static_cast<Acc*>(t.sums); }
};

template <Activation A, class T, class Factor>
void forward_run(const View<T>& v, int64_t offset, int64_t n, double scale, Factor factor) {
  residual_run<A>(Team{}, v.in(v.t.f) + offset, v.in(v.t.shortcut) + offset, v.out(v.t.h) + offset,
                  v.out(v.t.a) + offset, n, scale, factor);
}

template <Activation A, class T>
StreamGradient<A, T> stream_gradient(const View<T>& v, int64_t offset, double scale) {
  return {v.in(v.t.grad_h) + offset, v.in(v.t.grad_a) + offset, v.in(v.t.saved) + offset,
          static_cast<typename View<T>::Acc>(scale)};
}

template <Activation A, class T, class Factor>
void backward_run(const View<T>& v, int64_t offset, int64_t n, double scale, Factor factor) {
  residual_backward_run(Team{}, stream_gradient<A>(v, offset, scale), v.out(v.t.grad_shortcut) + offset,
                        v.out(v.t.grad_f) + offset, n, factor);
}

// Calls run(offset, n, channel index of the run's start) for every pixel of one block of channels of one sample.
template <class F>
void each_pixel(const ResidualTensor& t, int64_t unit, F run) {
  const int64_t sample = unit / channel_blocks(t), channel = unit % channel_blocks(t) * kChannelBlock;
  const int64_t n = std::min(kChannelBlock, t.channels - channel);
  for (int64_t pixel = 0; pixel < t.space; ++pixel) {
    run((sample * t.space + pixel) * t.channels + channel, n, sample * t.channels + channel);
  }
}

template <Activation A, class T>
void forward(const View<T>& v, double scale, int64_t first, int64_t last) {
  using Acc = typename View<T>::Acc;
  const ResidualTensor& t = v.t;
  if (!t.factor) return forward_run<A>(v, first, last - first, scale, One{});
  for (int64_t unit = first; unit < last; ++unit) {
    if (t.channels_last) {
      each_pixel(t, unit, [&](int64_t offset, int64_t n, int64_t channel) {
        forward_run<A>(v, offset, n, scale, PerElement<Acc>{v.factor() + channel});
      });
    } else {
      forward_run<A>(v, unit * t.space, t.space, scale, PerRun<Acc>{v.factor()[unit]});
    }
  }
}

template <Activation A, class T>
void backward_channels_last(const View<T>& v, double scale, int64_t unit) {
  using Acc = typename View<T>::Acc;
  each_pixel(v.t, unit, [&](int64_t offset, int64_t n, int64_t channel) {
    backward_run<A>(v, offset, n, scale, PerElement<Acc>{v.factor() + channel});
    if (!v.t.sums) return;
    Acc* sums = v.sums() + channel;
    const auto gradient = stream_gradient<A>(v, offset, scale);
    const T* f = v.in(v.t.f) + offset;
    Team{}.each(n, [=](int64_t i) { sums[i] += gradient(i) * load(f[i]); });
  });
}

template <Activation A, class T>
void backward_contiguous(const View<T>& v, double scale, int64_t unit) {
  using Acc = typename View<T>::Acc;
  const int64_t offset = unit * v.t.space;
  backward_run<A>(v, offset, v.t.space, scale, PerRun<Acc>{v.factor()[unit]});
  if (!v.t.sums) return;
  const auto gradient = stream_gradient<A>(v, offset, scale);
  const T* f = v.in(v.t.f) + offset;
  v.sums()[unit] = Team{}.template sum<Acc>(v.t.space, [=](int64_t i) { return gradient(i) * load(f[i]); });
}

template <Activation A, class T>
void backward(const View<T>& v, double scale, int64_t first, int64_t last) {
  if (!v.t.factor) {
    return residual_backward_run(Team{}, stream_gradient<A>(v, first, scale), v.out(v.t.grad_shortcut) + first,
                                 last - first);
  }
  for (int64_t unit = first; unit < last; ++unit) {
    if (v.t.channels_last) {
      backward_channels_last<A>(v, scale, unit);
    } else {
      backward_contiguous<A>(v, scale, unit);
    }
  }
}

}  // namespace

void residual(const ResidualTensor& t, Activation activation, double scale, int64_t first, int64_t last) {
  visit(activation, [&](auto a) {
    visit(t.dtype, [&](auto zero) { forward<decltype(a)::value>(View<decltype(zero)>{t}, scale, first, last); });
  });
}

void residual_backward(const ResidualTensor& t, Activation activation, double scale, int64_t first, int64_t last) {
  visit(activation, [&](auto a) {
    visit(t.dtype, [&](auto zero) { backward<decltype(a)::value>(View<decltype(zero)>{t}, scale, first, last); });
  });
}

}  // namespace NFK_ISA
}  // namespace cpu
}  // namespace nfk
