// The kernels as implementations of torch.ops.mixar.*, for the CPU or, with MIXAR_CUDA, for CUDA. The operators'
// schemas, fakes and gradients are in Python (mixar/ops). Only torch's stable ABI is used, so that a library also works
// with later releases of torch.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "kernels.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

#ifdef MIXAR_CUDA
#define MIXAR_DEVICE CUDA
#define MIXAR_RANDOM(name, m, place) mixar_random_##name##_cuda(&m, place)
constexpr int64_t kGroups = 32;  // of positions, whose sums for the map's gradient are separate

// Runs launch(stream) on the tensor's device and current stream.
template <typename F> void run(const Tensor& on, F launch) {
  const torch::stable::accelerator::DeviceGuard guard(on.get_device_index());
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream));
  const int error = launch(stream);
  STD_TORCH_CHECK(error >= 0, "mixar: no CUDA kernel for these dtypes");
  STD_TORCH_CHECK(error == 0, "mixar: CUDA error ", error, " at a kernel's launch");
}
#else
#define MIXAR_DEVICE CPU
#define MIXAR_RANDOM(name, m, place) (mixar::random_##name##_cpu(m, place), true)
constexpr int64_t kGroups = 16;

template <typename F> void run(const Tensor&, F launch) {
  const mixar::Parallel parallel = [](int64_t count, const mixar::Body& body) {
    torch::stable::parallel_for(0, count, 1, body);
  };
  STD_TORCH_CHECK(launch(parallel), "mixar: no CPU kernel for these dtypes");
}
#endif

mixar::Type type_of(ScalarType type) {
  if (type == ScalarType::BFloat16) return mixar::Type::bfloat16;
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "mixar: float32, bfloat16 or float64 needed");
  return type == ScalarType::Float ? mixar::Type::float32 : mixar::Type::float64;
}

// The tensors of a batch's Sources, made contiguous and kept alive.
struct Held {
  Tensor slots;
  Maybe codes, drawn, rho, share;

  Held(const Tensor& slots, const Maybe& codes, const Maybe& drawn, const Maybe& rho, const Maybe& share)
      : slots(contiguous(slots)), codes(contiguous(codes)), drawn(contiguous(drawn)), rho(contiguous(rho)), share(share) {}

  static Tensor contiguous(const Tensor& x) { return torch::stable::contiguous(x); }
  static Maybe contiguous(const Maybe& x) { return x ? Maybe(contiguous(*x)) : x; }

  // Raises if a slot is not below `tokens`, or an id not below a table's `entries`; the CUDA kernel asserts that.
  mixar::Sources sources(int64_t tokens, int64_t entries) const {
    const int64_t length = slots.size(1);
    const mixar::Sources sources{
        slots.size(0), length, codes ? length - codes->size(1) : 0, data<int64_t>(slots), data<int64_t>(codes),
        data<int64_t>(drawn), data<float>(rho), data<float>(share)};
#ifndef MIXAR_CUDA
    const int64_t slot = largest(slots), id = std::max(largest(codes), largest(drawn));
    STD_TORCH_CHECK(slot < tokens, "mixar: slot ", slot, " of ", tokens, " encoded tokens");
    STD_TORCH_CHECK(id < entries, "mixar: id ", id, " in a table of ", entries);
#endif
    return sources;
  }

  static int64_t largest(const Maybe& x) {
    if (!x || x->numel() == 0) return -1;
    const int64_t* begin = data<int64_t>(*x);
    return *std::max_element(begin, begin + x->numel());
  }

  template <typename T> static const T* data(const Tensor& x) { return static_cast<const T*>(x.data_ptr()); }
  template <typename T> static const T* data(const Maybe& x) { return x ? data<T>(*x) : nullptr; }
};

Tensor mix_gather(
    Tensor encoded, Tensor slots, Maybe codes, Maybe drawn, Maybe rho, Maybe share, Tensor weight, Maybe bias,
    Tensor positions) {
  const Held held(slots, codes, drawn, rho, share);
  encoded = Held::contiguous(encoded), weight = Held::contiguous(weight), positions = Held::contiguous(positions);
  bias = Held::contiguous(bias);
  const int64_t width = positions.size(1), tokens = encoded.size(0), entries = bias ? INT64_MAX : weight.size(0);
  Tensor out = torch::stable::new_empty(positions, {slots.size(0), slots.size(1), width});
  const mixar::MixGather m{
      held.sources(tokens, entries), width, tokens, bias ? weight.size(1) : -1, entries, encoded.data_ptr(),
      weight.data_ptr(), Held::data<void>(bias), positions.data_ptr(), out.data_ptr()};
  const mixar::Type gathered = type_of(encoded.scalar_type()), rest = type_of(positions.scalar_type());
#ifdef MIXAR_CUDA
  run(out, [&](void* stream) { return mixar_mix_gather_cuda(&m, gathered, rest, stream); });
#else
  run(out, [&](const mixar::Parallel& parallel) { return mixar::mix_gather_cpu(m, gathered, rest, parallel); });
#endif
  return out;
}

std::tuple<Tensor, Tensor, Tensor> mix_gather_backward(
    Tensor grad, Tensor slots, Maybe codes, Maybe drawn, Maybe rho, Maybe share, int64_t tokens, ScalarType gathered_type,
    int64_t bits) {
  const Held held(slots, codes, drawn, rho, share);
  grad = Held::contiguous(grad);
  const int64_t width = grad.size(2), groups = std::min(slots.size(1), kGroups);
  const mixar::Type gathered = type_of(gathered_type), rest = type_of(grad.scalar_type());
  const ScalarType sums = rest == mixar::Type::float64 ? ScalarType::Double : ScalarType::Float;
  Tensor d_encoded = torch::stable::new_empty(grad, {tokens, width}, gathered_type);
  Tensor d_positions = torch::stable::new_empty(grad, {slots.size(1), width}, sums);
  Tensor d_map = torch::stable::new_empty(grad, {groups, bits + 1, width}, sums);
  const mixar::MixGatherBackward m{
      held.sources(tokens, INT64_MAX), width, tokens, bits, groups, grad.data_ptr(), d_encoded.data_ptr(),
      d_positions.data_ptr(), d_map.data_ptr()};
#ifdef MIXAR_CUDA
  run(grad, [&](void* stream) { return mixar_mix_gather_backward_cuda(&m, gathered, rest, stream); });
#else
  run(grad, [&](const mixar::Parallel& parallel) { return mixar::mix_gather_backward_cpu(m, gathered, rest, parallel); });
#endif
  const int64_t over_groups[] = {0};
  return {d_encoded, d_positions, torch::stable::sum(d_map, torch::headeronly::IntHeaderOnlyArrayRef(over_groups, 1))};
}

// The tensor itself if its columns are neighbours, however far apart its rows are, else a contiguous copy.
Tensor with_whole_rows(const Tensor& x) { return x.stride(1) == 1 ? x : Held::contiguous(x); }

Tensor norm_modulate(Tensor x, Maybe weight, Maybe bias, Tensor shift, Tensor scale, double eps, ScalarType type) {
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) <= INT32_MAX, "mixar: x [R, w] needed, w below 2^31");
  const int64_t rows = x.size(0), width = x.size(1);
  for (const Tensor& given : {shift, scale}) {
    const bool fits = given.dim() == 2 && given.size(0) == rows && given.size(1) == width;
    STD_TORCH_CHECK(fits && given.scalar_type() == shift.scalar_type(),
                    "mixar: shift and scale [", rows, ", ", width, "] of one type needed");
  }
  for (const Maybe& given : {weight, bias}) {
    STD_TORCH_CHECK(!given || (given->numel() == width && given->scalar_type() == ScalarType::Float),
                    "mixar: weight and bias float32 [", width, "] needed");
  }
  x = Held::contiguous(x), weight = Held::contiguous(weight), bias = Held::contiguous(bias);
  shift = with_whole_rows(shift), scale = with_whole_rows(scale);
  Tensor out = torch::stable::new_empty(x, {rows, width}, type);
  const mixar::NormModulate m{
      rows, width, shift.stride(0), scale.stride(0), float(eps), x.data_ptr(), Held::data<float>(weight),
      Held::data<float>(bias), shift.data_ptr(), scale.data_ptr(), out.data_ptr()};
  const mixar::Type types[] = {type_of(x.scalar_type()), type_of(shift.scalar_type()), type_of(type)};
#ifdef MIXAR_CUDA
  run(out, [&](void* stream) { return mixar_norm_modulate_cuda(&m, types[0], types[1], types[2], stream); });
#else
  run(out, [&](const mixar::Parallel& parallel) {
    return mixar::norm_modulate_cpu(m, types[0], types[1], types[2], parallel);
  });
#endif
  return out;
}

Tensor timestep_embed(Tensor t, Tensor frequencies, ScalarType type) {
  t = Held::contiguous(t), frequencies = Held::contiguous(frequencies);
  Tensor out = torch::stable::new_empty(t, {t.size(0), 2 * frequencies.size(0)}, type);
  const mixar::TimestepEmbed m{
      t.size(0), frequencies.size(0), Held::data<float>(t), Held::data<float>(frequencies), out.data_ptr()};
#ifdef MIXAR_CUDA
  run(out, [&](void* stream) { return mixar_timestep_embed_cuda(&m, type_of(type), stream); });
#else
  run(out, [&](const mixar::Parallel& parallel) { return mixar::timestep_embed_cpu(m, type_of(type), parallel); });
#endif
  return out;
}

// The numbers of a batch's images [B, count]: draw(random, place) calls the kernel on a stream or with threads.
template <typename F>
Tensor random_numbers(Tensor index, int64_t key, int64_t start, int64_t count, ScalarType type, F draw) {
  STD_TORCH_CHECK(index.dim() == 1 && index.scalar_type() == ScalarType::Long, "mixar: index int64 [B] needed");
  STD_TORCH_CHECK(count >= 0, "mixar: ", count, " numbers per image");
  index = Held::contiguous(index);
  Tensor out = torch::stable::new_empty(index, {index.size(0), count}, type);
  const mixar::Random m{
      index.size(0), count, uint64_t(key), uint64_t(start), Held::data<int64_t>(index), out.data_ptr()};
  run(out, [&](const auto& place) { return draw(m, place); });
  return out;
}

Tensor random_bits(Tensor index, int64_t key, int64_t start, int64_t count) {
  return random_numbers(index, key, start, count, ScalarType::Long,
                        [](const auto& m, const auto& place) { return MIXAR_RANDOM(bits, m, place); });
}

Tensor random_uniform(Tensor index, int64_t key, int64_t start, int64_t count) {
  return random_numbers(index, key, start, count, ScalarType::Float,
                        [](const auto& m, const auto& place) { return MIXAR_RANDOM(uniform, m, place); });
}

#ifdef MIXAR_CUDA
Tensor random_normal(Tensor index, int64_t key, int64_t start, int64_t count) {
  return random_numbers(index, key, start, count, ScalarType::Float,
                        [](const auto& m, const auto& place) { return MIXAR_RANDOM(normal, m, place); });
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mixar, MIXAR_DEVICE, m) {
  m.impl("mix_gather", TORCH_BOX(&mix_gather));
  m.impl("mix_gather_backward", TORCH_BOX(&mix_gather_backward));
  m.impl("norm_modulate", TORCH_BOX(&norm_modulate));
  m.impl("timestep_embed", TORCH_BOX(&timestep_embed));
  m.impl("random_bits", TORCH_BOX(&random_bits));
  m.impl("random_uniform", TORCH_BOX(&random_uniform));
#ifdef MIXAR_CUDA
  m.impl("random_normal", TORCH_BOX(&random_normal));  // the CPU composes it of bits and torch's vectorised functions
#endif
}
