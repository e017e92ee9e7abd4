// Runs the kernels of argv[1], cpu or cuda (emulated), on buffers of their exact sizes, for the sanitizers to watch.
// With argv[2] the outputs are one byte short, which must be seen.
#include <random>
#include <string>
#include <vector>

#include "kernels.h"

using namespace mixar;

namespace {

std::mt19937 random_bits{0};
bool cpu = true;
size_t missing = 0;

size_t size_of(Type type) { return type == Type::float64 ? 8 : type == Type::float32 ? 4 : 2; }

std::vector<char> zeros(Type type, int64_t count, size_t missing = 0) {
  return std::vector<char>(std::max(size_of(type) * size_t(count), missing) - missing);
}

void parallel(int64_t count, const Body& body) { body(0, count / 2), body(count / 2, count); }

bool run(int64_t images, int64_t n, int64_t prefix, int64_t width, int64_t bits, bool mix, Type gathered, Type rest) {
  const int64_t length = prefix + n, groups = std::min<int64_t>(length, 3), entries = 5;
  const Type sums = rest == Type::float64 ? rest : Type::float32;
  std::vector<int64_t> slots(size_t(images * length)), codes(size_t(images * n)), drawn(codes.size());
  std::vector<float> rho(codes.size()), share{0.5f};
  int64_t tokens = 0;
  for (size_t at = 0; at < slots.size(); ++at) {
    const bool seen = int64_t(at) % length < prefix || random_bits() % 3 == 0;
    slots[at] = seen ? tokens++ : -1;
  }
  for (size_t at = 0; at < codes.size(); ++at) {
    codes[at] = int64_t(random_bits() % (entries + 1)) - 1, drawn[at] = int64_t(random_bits() % entries);
    rho[at] = float(random_bits() % 100) / 100;
  }
  const Sources sources{images, length, prefix, slots.data(), codes.data(), mix ? drawn.data() : nullptr,
                      mix ? rho.data() : nullptr, mix ? share.data() : nullptr};
  const auto encoded = zeros(gathered, tokens * width), positions = zeros(rest, length * width);
  const auto weight = zeros(rest, (bits < 0 ? entries : bits) * width), bias = zeros(rest, width);
  auto out = zeros(rest, images * length * width, missing), d_encoded = encoded;
  auto d_positions = zeros(sums, length * width), d_map = zeros(sums, groups * (bits + 1) * width);
  const MixGather forward{sources, width, tokens, bits, entries, encoded.data(), weight.data(), bias.data(),
                          positions.data(), out.data()};
  const MixGatherBackward backward{sources, width, tokens, bits, groups, out.data(), d_encoded.data(),
                                   d_positions.data(), d_map.data()};
  if (cpu) {
    return mix_gather_cpu(forward, gathered, rest, parallel) &&
           mix_gather_backward_cpu(backward, gathered, rest, parallel);
  }
  return mixar_mix_gather_cuda(&forward, gathered, rest, nullptr) == 0 &&
         mixar_mix_gather_backward_cuda(&backward, gathered, rest, nullptr) == 0;
}

bool embed(int64_t rows, int64_t half, Type type) {
  const std::vector<float> t(size_t(rows), 999.0f), frequencies(size_t(half), 0.7f);
  auto out = zeros(type, rows * 2 * half);
  const TimestepEmbed m{rows, half, t.data(), frequencies.data(), out.data()};
  return cpu ? timestep_embed_cpu(m, type, parallel) : mixar_timestep_embed_cuda(&m, type, nullptr) == 0;
}

bool normed(int64_t rows, int64_t width, int64_t stride, bool affine, Type x, Type modulation, Type type) {
  const auto from = zeros(x, rows * width), shift = zeros(modulation, (rows - 1) * 3 * width + width);
  const auto scale = zeros(modulation, (rows - 1) * stride + width);
  const auto weight = zeros(Type::float32, width);
  const float* scales = affine ? reinterpret_cast<const float*>(weight.data()) : nullptr;
  auto out = zeros(type, rows * width, missing);
  const NormModulate m{rows, width, 3 * width, stride, 1e-6f, from.data(), scales, scales, shift.data(), scale.data(),
                       out.data()};
  if (cpu) return norm_modulate_cpu(m, x, modulation, type, parallel);
  return mixar_norm_modulate_cuda(&m, x, modulation, type, nullptr) == 0;
}

bool random_numbers(int64_t images, int64_t count) {
  const std::vector<int64_t> index(size_t(images), INT64_MAX);
  auto bits = zeros(Type::float64, images * count, missing), floats = zeros(Type::float32, images * count, missing);
  const Random wide{images, count, UINT64_MAX, 5, index.data(), bits.data()};
  Random narrow = wide;
  narrow.out = floats.data();
  if (cpu) return random_bits_cpu(wide, parallel), random_uniform_cpu(narrow, parallel), true;
  return mixar_random_bits_cuda(&wide, nullptr) == 0 && mixar_random_uniform_cuda(&narrow, nullptr) == 0 &&
         mixar_random_normal_cuda(&narrow, nullptr) == 0;
}

}  // namespace

int main(int count, char** words) {
  cpu = std::string(words[1]) == "cpu", missing = count > 2;
  bool good = embed(1, 1, Type::float32) && embed(7, 43, Type::float32) && embed(5, 128, Type::bfloat16);
  good &= random_numbers(0, 3) && random_numbers(3, 0) && random_numbers(1, 1) && random_numbers(7, 35);
  good &= random_numbers(2, 4096) && random_numbers(3, 32767);
  for (const Type x : {Type::float32, Type::bfloat16}) {
    for (const Type modulation : {Type::float32, Type::bfloat16}) {
      for (const Type type : {Type::float32, Type::bfloat16}) {
        good &= normed(1, 1, 1, false, x, modulation, type) && normed(3, 33, 36, true, x, modulation, type);
        good &= normed(5, 64, 192, true, x, modulation, type) && normed(5, 64, 193, true, x, modulation, type);
        good &= normed(2, 8200, 8200, false, x, modulation, type) && normed(1, 2051, 2051, true, x, modulation, type);
        good &= normed(1, 16392, 16392, true, x, modulation, type);
      }
    }
  }
  const Type types[][2] = {{Type::float32, Type::float32}, {Type::bfloat16, Type::float32},
                           {Type::bfloat16, Type::bfloat16}, {Type::float64, Type::float64}};
  for (const auto& type : types) {
    for (const int64_t bits : {-1, 0, 3, 24}) {
      good &= run(1, 1, 0, 1, bits, false, type[0], type[1]);
      good &= run(3, 9, 2, 33, bits, true, type[0], type[1]);
      good &= run(9, 4, 1, 130, bits, true, type[0], type[1]);
      good &= run(5, 9, 2, 136, bits, true, type[0], type[1]);
    }
  }
  return good ? 0 : 1;
}
