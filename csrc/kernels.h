// The functions of the CPU and the CUDA files for bind.cpp. Those for several types return false if they have no
// kernel for the given ones.
#pragma once

#include "mix_gather.h"
#include "norm_modulate.h"
#include "random.h"
#include "timestep_embed.h"

namespace mixar {

bool mix_gather_cpu(const MixGather& m, Type gathered, Type rest, const Parallel& parallel);
bool mix_gather_backward_cpu(const MixGatherBackward& m, Type gathered, Type rest, const Parallel& parallel);
bool norm_modulate_cpu(const NormModulate& m, Type x, Type modulation, Type out, const Parallel& parallel);
bool timestep_embed_cpu(const TimestepEmbed& m, Type type, const Parallel& parallel);
void random_bits_cpu(const Random& m, const Parallel& parallel);
void random_uniform_cpu(const Random& m, const Parallel& parallel);

}  // namespace mixar

// Launches on the CUDA stream `stream` return 0, or the error of the launch; -1 without a kernel for the types.
extern "C" {
int mixar_mix_gather_cuda(const mixar::MixGather* m, mixar::Type gathered, mixar::Type rest, void* stream);
int mixar_mix_gather_backward_cuda(
    const mixar::MixGatherBackward* m, mixar::Type gathered, mixar::Type rest, void* stream);
int mixar_norm_modulate_cuda(
    const mixar::NormModulate* m, mixar::Type x, mixar::Type modulation, mixar::Type out, void* stream);
int mixar_timestep_embed_cuda(const mixar::TimestepEmbed* m, mixar::Type type, void* stream);
int mixar_random_bits_cuda(const mixar::Random* m, void* stream);
int mixar_random_uniform_cuda(const mixar::Random* m, void* stream);
int mixar_random_normal_cuda(const mixar::Random* m, void* stream);
}
