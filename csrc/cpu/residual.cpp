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
  const Acc* bias() const { return static_cast<const Acc*>(t.bias); }
  Acc* sums() const { return static_cast<Acc*>(t.sums); }
  Acc* bias_sums() const { return static_cast<Acc*>(t.bias_sums); }
};

// A dense run of elements, and where its (first) channel lies in what is smaller.
struct Run {
  int64_t offset;
  int64_t n;
  int64_t channel;  // of bias
  int64_t factor;
  int64_t sum;
};

// A unit is one run: a channel of a sample.
struct Contiguous {
  template <class Acc>
  using Varying = PerRun<Acc>;

  template <class F>
  static void each_run(const ResidualTensor& t, int64_t unit, F run) {
    run(Run{unit * t.space, t.space, unit % t.channels, unit, unit});
  }

  template <class Acc, class F>
  static void add(Acc* sums, int64_t n, F f) {
    *sums += Team{}.template sum<Acc>(n, f);
  }
};

// A unit is a block of pixels, each a run of some channels; every block of pixels has its own row of sums.
struct ChannelsLast {
  template <class Acc>
  using Varying = PerElement<Acc>;

  template <class F>
  static void each_run(const ResidualTensor& t, int64_t unit, F run) {
    const int64_t row = unit / channel_blocks(t), channel = unit % channel_blocks(t) * t.unit_channels;
    const int64_t n = std::min(t.unit_channels, t.channels - channel);
    const int64_t sample = row / pixel_blocks(t), first = row % pixel_blocks(t) * t.unit_pixels;
    const int64_t last = std::min(first + t.unit_pixels, t.space);
    for (int64_t pixel = first; pixel < last; ++pixel) {
      run(Run{(sample * t.space + pixel) * t.channels + channel, n, channel, sample * t.channels + channel,
              row * t.channels + channel});
    }
  }

  template <class Acc, class F>
  static void add(Acc* sums, int64_t n, F f) {
    Team{}.each(n, [=](int64_t i) { sums[i] += f(i); });
  }
};

template <Activation A, class T, class Branch>
void forward_run(const View<T>& v, int64_t offset, int64_t n, double scale, Branch branch) {
  residual_run<A>(Team{}, v.in(v.t.f) + offset, v.in(v.t.shortcut) + offset, v.out(v.t.h) + offset,
                  v.out(v.t.a) + offset, n, scale, branch);
}

template <Activation A, class Layout, class T>
void forward_units(const View<T>& v, double scale, int64_t first, int64_t last) {
  using Varying = typename Layout::template Varying<typename View<T>::Acc>;
  const auto forward_one = [&](const Run& run) {
    const auto forward_branch = [&](auto branch) { forward_run<A>(v, run.offset, run.n, scale, branch); };
    if (!v.t.bias) return forward_branch(Scaled<Varying>{Varying(v.factor() + run.factor)});
    const Varying bias(v.bias() + run.channel);
    if (!v.t.factor) return forward_branch(Shifted<One, Varying>{One{}, bias});
    forward_branch(Shifted<Varying, Varying>{Varying(v.factor() + run.factor), bias});
  };
  for (int64_t unit = first; unit < last; ++unit) Layout::each_run(v.t, unit, forward_one);
}

template <Activation A, class T>
void forward(const View<T>& v, double scale, int64_t first, int64_t last) {
  if (is_flat(v.t)) return forward_run<A>(v, first, last - first, scale, Scaled<One>{One{}});
  if (v.t.channels_last) return forward_units<A, ChannelsLast>(v, scale, first, last);
  forward_units<A, Contiguous>(v, scale, first, last);
}

template <class Layout, class T, class Gradient>
void backward_units(const View<T>& v, const Gradient& of_all, int64_t first, int64_t last) {
  using Varying = typename Layout::template Varying<typename View<T>::Acc>;
  const auto backward_one = [&](const Run& run) {
    const Gradient gradient = of_all.from(run.offset);
    T* grad_shortcut = v.out(v.t.grad_shortcut) + run.offset;
    const T* f = v.in(v.t.f) + (v.t.sums ? run.offset : 0);
    // The gradient of GELU costs more than memory does: it is computed once for all that is made of it.
    const auto apply = [&](auto store) {
      if (v.t.bias_sums) return Layout::add(v.bias_sums() + run.sum, run.n, store);
      if (!v.t.sums) return Team{}.each(run.n, store);
      Layout::add(v.sums() + run.sum, run.n, [=](int64_t i) { return store(i) * load(f[i]); });
    };
    if (v.t.factor) {
      const Varying factor(v.factor() + run.factor);
      apply(StoreBoth<T, Gradient, Varying>{gradient, factor, grad_shortcut, v.out(v.t.grad_f) + run.offset});
    } else {
      apply(StoreShortcut<T, Gradient>{gradient, grad_shortcut});
    }
    if (!v.t.sums || !v.t.bias_sums) return;
    // Both sums are rarely wanted; the run is now in the cache.
    Layout::add(v.sums() + run.sum, run.n, [=](int64_t i) { return gradient(i) * load(f[i]); });
  };
  for (int64_t unit = first; unit < last; ++unit) Layout::each_run(v.t, unit, backward_one);
}

template <class T, class Gradient>
void backward(const View<T>& v, const Gradient& gradient, int64_t first, int64_t last) {
  if (is_flat(v.t)) {
    T* grad_shortcut = v.out(v.t.grad_shortcut) + first;
    return Team{}.each(last - first, StoreShortcut<T, Gradient>{gradient.from(first), grad_shortcut});
  }
  if (v.t.channels_last) return backward_units<ChannelsLast>(v, gradient, first, last);
  backward_units<Contiguous>(v, gradient, first, last);
}

}  // namespace

void residual(const ResidualTensor& t, Activation activation, double scale, int64_t first, int64_t last) {
  visit(activation, [&](auto a) {
    visit(t.dtype, [&](auto zero) { forward<decltype(a)::value>(View<decltype(zero)>{t}, scale, first, last); });
  });
}

void residual_backward(const ResidualTensor& t, Activation activation, double scale, int64_t first, int64_t last) {
  visit(activation, [&](auto a) {
    visit(t.dtype, [&](auto zero) {
      using T = decltype(zero);
      const View<T> v{t};
      const ActivationGradient<decltype(a)::value, T> of_activation{
          v.in(t.grad_a), v.in(t.saved), static_cast<typename View<T>::Acc>(scale)};
      if (!t.grad_h) return backward(v, of_activation, first, last);
      backward(v, StreamGradient<decltype(a)::value, T>{v.in(t.grad_h), of_activation}, first, last);
    });
  });
}

}  // namespace NFK_ISA
}  // namespace cpu
}  // namespace nfk
