// Runs a TorchScript file with LibTorch; backend.h says what this header defines.

#pragma once

#include <ATen/Parallel.h>
#include <torch/script.h>
#include <torch/version.h>

using std::string;

inline const string FORMAT = "a TorchScript file", SUFFIX = ".pt";
inline const std::vector<string> MODELS = {"model.pt"};

inline string engine() { return "LibTorch " TORCH_VERSION; }

inline string message(const std::exception& error) {
  const auto* torch_error = dynamic_cast<const c10::Error*>(&error);
  return torch_error ? torch_error->what_without_backtrace() : error.what();
}

class Network {
  torch::jit::Module module;

 public:
  string spec;

  Network(const string& path, int threads) {
    at::set_num_threads(threads);
    torch::jit::ExtraFilesMap extra{{"spec.json", ""}};
    module = torch::jit::load(path, torch::kCPU, extra);
    module.eval();
    spec = extra["spec.json"];
  }

  // uint8 pixels [1, height, width, channels] -> the outputs, in their order.
  std::vector<Output> run(uint8_t* pixels, int height, int width, int channels) {
    const c10::InferenceMode guard;  // keeps nothing for gradients
    const std::vector<int64_t> shape = {1, height, width, channels};
    const torch::Tensor input = torch::from_blob(pixels, shape, torch::kUInt8);
    const torch::IValue output = module.forward({input});

    // A file without `known` gives a tensor and no tuple.
    std::vector<torch::IValue> elements = {output};
    if (output.isTuple()) elements = output.toTupleRef().elements().vec();

    std::vector<Output> outputs;
    for (const torch::IValue& element : elements) {
      const torch::Tensor tensor = element.toTensor().to(torch::kFloat).contiguous();
      const float* const values = tensor.data_ptr<float>();
      outputs.push_back({tensor.sizes().vec(), {values, values + tensor.numel()}});
    }
    return outputs;
  }
};
