#include <algorithm>

#include "isa.h"
#include "team.h"

namespace nfk {
namespace cpu {
namespace NFK_ISA {
namespace {

// Elements of a piece, in float32 2 KB. A unit is worked on piece by piece in several loops, between which a piece stays in
// the first-level cache: only light loops go over runs, which may be short, and not those of the activations, whose some 25
// constants have to be loaded first. Pieces of 256 to 1024 elements take as long.
constexpr int64_t kPiece = 512;

// In channels_last order of few channels: what there is one of per channel, repeated over a piece of whole pixels. All
// pieces of a unit share it, and their loops are as long as they are: over runs of 64 channels they take up to twice as long.
template <class Acc>
struct Repeated {
  Acc factor[kPiece];
  Acc bias[kPiece];
  Acc sums[kPiece];
  Acc bias_sums[kPiece];
};

// The tensors of a piece; each is null where the whole one is.
template <class T>
struct View {
  using Acc = typename Accumulate<T>::type;
  const ResidualTensor& t;
  int64_t start;
  int64_t n;
  int64_t row;  // of sums, in channels_last order
  Repeated<Acc>* repeated;  // or null

  const T* in(const void* data) const { return data ? static_cast<const T*>(data) + start : nullptr; }
  T* out(void* data) const { return data ? static_cast<T*>(data) + start : nullptr; }
};

// Elements one behind the other that are of one channel, in channels_last order of one pixel.
int64_t run_length(const ResidualTensor& t) { return is_flat(t) ? 1 : t.channels_last ? t.channels : t.space; }

// Elements of a piece: of whole runs, where possible.
int64_t piece_length(const ResidualTensor& t) {
  const int64_t run = run_length(t);
  return run < kPiece ? kPiece / run * run : kPiece;
}

// An element of one of the smaller tensors; null where there is none.
template <class Acc>
Acc* element(void* data, int64_t i) {
  return data ? static_cast<Acc*>(data) + i : nullptr;
}
template <class Acc>
const Acc* element(const void* data, int64_t i) {
  return data ? static_cast<const Acc*>(data) + i : nullptr;
}

template <class Acc>
void repeat(const Acc* values, int64_t channels, Acc* to, int64_t n) {
  for (int64_t i = 0; values && i < n; i += channels) std::copy_n(values, channels, to + i);
}

// Adds up what was repeated; null where nothing was.
template <class Acc>
void fold(const Acc* from, int64_t n, int64_t channels, Acc* sums) {
  for (int64_t i = 0; sums && i < n; i += channels) {
    Team{}.each(channels, [=](int64_t channel) { sums[channel] += from[i + channel]; });
  }
}

// Calls f(view) for each piece of some runs.
template <class T, class F>
void each_piece_of(const View<T>& runs, F f) {
  const int64_t end = runs.start + runs.n, step = piece_length(runs.t);
  for (int64_t start = runs.start; start < end; start += step) {
    f(View<T>{runs.t, start, std::min(step, end - start), runs.row, runs.repeated});
  }
}

template <class T, class F>
void each_piece(const ResidualTensor& t, int64_t first, int64_t last, F f) {
  using Acc = typename Accumulate<T>::type;
  const int64_t channels = t.channels, run = run_length(t), length = piece_length(t);
  if (is_flat(t) || !t.channels_last) return each_piece_of(View<T>{t, first * run, (last - first) * run, 0, nullptr}, f);
  Repeated<Acc> repeated;
  for (int64_t unit = first; unit < last; ++unit) {
    const int64_t sample = unit / pixel_blocks(t), pixel = unit % pixel_blocks(t) * t.block_pixels;
    const int64_t start = sample * t.space + pixel, pixels = std::min(t.block_pixels, t.space - pixel);
    const View<T> block{t, start * run, pixels * run, unit, 2 * channels <= kPiece ? &repeated : nullptr};
    if (!block.repeated) {
      each_piece_of(block, f);
      continue;
    }
    repeat(element<Acc>(t.factor, sample * channels), channels, repeated.factor, length);
    repeat(element<Acc>(t.bias, 0), channels, repeated.bias, length);
    std::fill_n(repeated.sums, length, Acc{0});
    std::fill_n(repeated.bias_sums, length, Acc{0});
    each_piece_of(block, f);
    fold(repeated.sums, length, channels, element<Acc>(t.sums, unit * channels));
    fold(repeated.bias_sums, length, channels, element<Acc>(t.bias_sums, unit * channels));
  }
}

// What is smaller than the tensor is the same for all of a run in contiguous order, and else has an element for each of its.
struct Contiguous {
  template <class Acc>
  static NFK_INLINE auto at(const Acc* values) {
    return [value = *values](int64_t) { return value; };
  }
  template <class Acc, class F>
  static NFK_INLINE void sum(Acc* sums, int64_t n, F f) {
    *sums += Team{}.template sum<Acc>(n, f);
  }
};
struct ChannelsLast {
  template <class Acc>
  static NFK_INLINE auto at(const Acc* values) {
    return [values](int64_t i) { return values[i]; };
  }
  template <class Acc, class F>
  static NFK_INLINE void sum(Acc* sums, int64_t n, F f) {
    Team{}.each(n, [=](int64_t i) { sums[i] += f(i); });
  }
};

// Where a run begins in the piece, and what there is of it in what is smaller.
template <class Acc>
struct Run {
  int64_t offset;
  int64_t n;
  const Acc* factor;
  const Acc* bias;
  Acc* sums;
  Acc* bias_sums;
};

// Calls f(run, layout) for each run of a piece or part of one, or for all at once that are repeated.
template <class T, class F>
void each_run(const View<T>& v, F f) {
  using Acc = typename View<T>::Acc;
  const ResidualTensor& t = v.t;
  if (Repeated<Acc>* r = v.repeated) {
    return f(Run<Acc>{0, v.n, r->factor, r->bias, r->sums, r->bias_sums}, ChannelsLast{});
  }
  const auto run_of = [&](int64_t offset, int64_t n, int64_t factor, int64_t channel, int64_t sum) {
    return Run<Acc>{offset,
                    n,
                    element<Acc>(t.factor, factor),
                    element<Acc>(t.bias, channel),
                    element<Acc>(t.sums, sum),
                    element<Acc>(t.bias_sums, sum)};
  };
  const int64_t length = run_length(t), end = v.start + v.n;
  for (int64_t start = v.start; start < end;) {
    const int64_t run = start / length, within = start % length;
    const int64_t offset = start - v.start, n = std::min(length - within, end - start);
    if (t.channels_last) {
      const int64_t factor = run / t.space * t.channels + within;
      f(run_of(offset, n, factor, within, v.row * t.channels + within), ChannelsLast{});
    } else {
      f(run_of(offset, n, run, run % t.channels, run), Contiguous{});
    }
    start += n;
  }
}

// x = factor * f + bias.
template <class T, class Acc>
void read_branch(const View<T>& v, const T* f, Acc* x) {
  each_run(v, [&](const Run<Acc>& run, auto layout) {
    const T* from = f + run.offset;
    Acc* to = x + run.offset;
    if (!v.t.bias) return read_scaled(Team{}, from, layout.at(run.factor), to, run.n);
    if (!v.t.factor) return read_shifted(Team{}, from, layout.at(run.bias), to, run.n);
    read_scaled_and_shifted(Team{}, from, layout.at(run.factor), layout.at(run.bias), to, run.n);
  });
}

template <Activation A, class T, class In>
void write_outputs(const View<T>& v, const In* x, double scale) {
  if (!v.t.h) return activate<A>(Team{}, x, v.out(v.t.a), v.n, scale);
  // The activation sees h as stored, so that a backward pass that recomputes from h agrees with it.
  write_sum(Team{}, x, v.in(v.t.shortcut), v.out(v.t.h), v.n);
  activate<A>(Team{}, v.out(v.t.h), v.out(v.t.a), v.n, scale);
}

template <Activation A, class T>
void forward(const View<T>& v, double scale) {
  if (!v.t.factor && !v.t.bias) return write_outputs<A>(v, v.in(v.t.f), scale);
  typename View<T>::Acc x[kPiece];
  read_branch(v, v.in(v.t.f), x);
  write_outputs<A>(v, x, scale);
}

template <Activation A, class T>
void backward(const View<T>& v, double scale) {
  using Acc = typename View<T>::Acc;
  Acc x[kPiece];
  const auto write = [&](auto gradient) { write_gradient(Team{}, gradient, x, v.out(v.t.grad_shortcut), v.n); };
  const ActivationGradient<A, T, T> of_activation{v.in(v.t.grad_a), v.in(v.t.saved), static_cast<Acc>(scale)};
  if (v.t.bias) {
    read_branch(v, of_activation.saved, x);
    write(ActivationGradient<A, T, Acc>{of_activation.grad_a, x, of_activation.scale});
  } else if (v.t.grad_h) {
    write(StreamGradient<A, T>{v.in(v.t.grad_h), of_activation});
  } else {
    write(of_activation);
  }
  if (v.t.factor) {
    each_run(v, [&](const Run<Acc>& run, auto layout) {
      const auto factor = layout.at(run.factor);
      T* grad_f = v.out(v.t.grad_f) + run.offset;
      if (!v.t.sums) return write_scaled(Team{}, x + run.offset, factor, grad_f, run.n);
      const T* f = v.in(v.t.f) + run.offset;
      layout.sum(run.sums, run.n, FactorGradient<T, decltype(factor)>{x + run.offset, f, factor, grad_f});
    });
  }
  if (v.t.bias_sums) {
    each_run(v, [&](const Run<Acc>& run, auto layout) {
      const Acc* grad = x + run.offset;
      layout.sum(run.bias_sums, run.n, [=](int64_t i) { return grad[i]; });
    });
  }
}

}  // namespace

void residual(const ResidualTensor& t, Activation activation, double scale, int64_t first, int64_t last) {
  visit(activation, [&](auto a) {
    visit(t.dtype, [&](auto zero) {
      using T = decltype(zero);
      each_piece<T>(t, first, last, [&](const View<T>& piece) { forward<decltype(a)::value>(piece, scale); });
    });
  });
}

void residual_backward(const ResidualTensor& t, Activation activation, double scale, int64_t first, int64_t last) {
  visit(activation, [&](auto a) {
    visit(t.dtype, [&](auto zero) {
      using T = decltype(zero);
      each_piece<T>(t, first, last, [&](const View<T>& piece) { backward<decltype(a)::value>(piece, scale); });
    });
  });
}

}  // namespace NFK_ISA
}  // namespace cpu
}  // namespace nfk
