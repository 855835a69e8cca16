// Runs an ONNX file with the C API of onnxruntime; backend.h says what this header defines.
//
// Such a file holds data only. onnxruntime runs code of others only from libraries that a program
// registers, and this one registers none.

#pragma once

#include <onnxruntime_c_api.h>

#include <cstdlib>
#include <memory>
#include <stdexcept>

#include "files.h"
#include "onnx_file.h"
#include "problem.h"

using std::string;

inline const string FORMAT = "an ONNX file", SUFFIX = ".onnx";
inline const std::vector<string> MODELS = {"model.onnx", "model.int8.onnx"};

// onnxruntime 1.15, the oldest that runs a file of step2_export.py.
constexpr uint32_t API_VERSION = 15;

inline string engine() { return string("onnxruntime ") + OrtGetApiBase()->GetVersionString(); }

inline string message(const std::exception& error) { return error.what(); }

// The functions of onnxruntime. Throws std::runtime_error if it is too old.
inline const OrtApi& ort() {
  static const OrtApi* const functions = OrtGetApiBase()->GetApi(API_VERSION);
  if (!functions) throw std::runtime_error("this program needs onnxruntime 1.15 or newer");
  return *functions;
}

// Throws std::runtime_error if a call has failed.
inline void check(OrtStatus* status) {
  if (!status) return;
  const string text = ort().GetErrorMessage(status);
  ort().ReleaseStatus(status);
  throw std::runtime_error(text);
}

// An object of onnxruntime, and the function that releases it.
template <typename T>
using Owned = std::unique_ptr<T, void (*)(T*)>;

// create(place) makes the object and puts a pointer to it at `place`. Throws std::runtime_error.
template <typename T, typename Create>
Owned<T> own(void (*release)(T*), Create create) {
  T* object = nullptr;
  check(create(&object));
  return {object, release};
}

// A string of onnxruntime, which get(allocator, place) makes; empty if there is none. Throws
// std::runtime_error.
template <typename Get>
string text_of(Get get) {
  OrtAllocator* allocator = nullptr;
  check(ort().GetAllocatorWithDefaultOptions(&allocator));
  char* text = nullptr;
  check(get(allocator, &text));
  const string copy = text ? text : "";
  check(ort().AllocatorFree(allocator, text));
  return copy;
}

// The bytes of an ONNX file that holds all its weights. Throws Problem for others,
// std::runtime_error for what is no ONNX file.
inline string read_model(const string& path) {
  string bytes;
  try {
    bytes = read_file(path);
  } catch (const Problem& problem) {
    throw Problem(path + " " + problem.what());
  }

  if (has_external_data(bytes))
    throw Problem(path + " keeps weights outside the file, which is refused");
  return bytes;
}

class Network {
  Owned<OrtEnv> environment{nullptr, nullptr};
  Owned<OrtSession> session{nullptr, nullptr};
  string input;
  std::vector<string> names;  // of the outputs

 public:
  string spec;

  Network(const string& path, int threads) {
    // onnxruntime is given the bytes that were looked at: the file may change, and for a path it
    // would choose another format by the suffix.
    const string bytes = read_model(path);

    setenv("ORT_DISABLE_TELEMETRY", "1", 0);  // onnxruntime 1.31 keeps an ID of the device
    environment = own<OrtEnv>(ort().ReleaseEnv, [](OrtEnv** made) {
      // Failures arrive as a status.
      return ort().CreateEnv(ORT_LOGGING_LEVEL_FATAL, "threestep", made);
    });

    const auto options = own<OrtSessionOptions>(
        ort().ReleaseSessionOptions,
        [](OrtSessionOptions** made) { return ort().CreateSessionOptions(made); });
    check(ort().SetIntraOpNumThreads(options.get(), threads));
    // Idle threads would spin while the next image is decoded.
    check(ort().AddSessionConfigEntry(options.get(), "session.intra_op.allow_spinning", "0"));
    check(ort().AddSessionConfigEntry(options.get(), "session.load_model_format", "ONNX"));

    session = own<OrtSession>(ort().ReleaseSession, [&](OrtSession** made) {
      return ort().CreateSessionFromArray(environment.get(), bytes.data(), bytes.size(),
                                          options.get(), made);
    });
    read_names();
    read_spec();
  }

  // uint8 pixels [1, height, width, channels] -> the outputs, in their order.
  std::vector<Output> run(uint8_t* pixels, int height, int width, int channels) {
    const std::vector<int64_t> shape = {1, height, width, channels};
    const size_t size = size_t(height) * width * channels;
    const auto memory = own<OrtMemoryInfo>(ort().ReleaseMemoryInfo, [](OrtMemoryInfo** made) {
      return ort().CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, made);
    });
    const auto image = own<OrtValue>(ort().ReleaseValue, [&](OrtValue** made) {
      return ort().CreateTensorWithDataAsOrtValue(memory.get(), pixels, size, shape.data(),
                                                  shape.size(),
                                                  ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, made);
    });

    const char* const inputs[] = {input.c_str()};
    const OrtValue* const images[] = {image.get()};
    std::vector<const char*> wanted;
    for (const string& name : names) wanted.push_back(name.c_str());
    std::vector<OrtValue*> values(names.size());
    check(ort().Run(session.get(), nullptr, inputs, images, 1, wanted.data(), wanted.size(),
                    values.data()));

    std::vector<Owned<OrtValue>> owned;
    for (OrtValue* value : values) owned.emplace_back(value, ort().ReleaseValue);

    std::vector<Output> outputs;
    for (const auto& value : owned) outputs.push_back(read(value.get()));
    return outputs;
  }

 private:
  void read_names() {
    const auto name_of = [&](auto function, size_t k) {
      return text_of([&](OrtAllocator* allocator, char** name) {
        return function(session.get(), k, allocator, name);
      });
    };
    input = name_of(ort().SessionGetInputName, 0);
    size_t count = 0;
    check(ort().SessionGetOutputCount(session.get(), &count));
    for (size_t k = 0; k < count; k++) names.push_back(name_of(ort().SessionGetOutputName, k));
  }

  void read_spec() {
    const auto metadata = own<OrtModelMetadata>(
        ort().ReleaseModelMetadata,
        [&](OrtModelMetadata** made) {
          return ort().SessionGetModelMetadata(session.get(), made);
        });
    spec = text_of([&](OrtAllocator* allocator, char** text) {
      return ort().ModelMetadataLookupCustomMetadataMap(metadata.get(), allocator, "spec", text);
    });
  }

  static Output read(OrtValue* value) {
    int is_tensor = 0;
    check(ort().IsTensor(value, &is_tensor));
    if (!is_tensor) throw std::runtime_error("an output is not a tensor");

    const auto info = own<OrtTensorTypeAndShapeInfo>(
        ort().ReleaseTensorTypeAndShapeInfo,
        [&](OrtTensorTypeAndShapeInfo** made) { return ort().GetTensorTypeAndShape(value, made); });
    ONNXTensorElementDataType type;
    check(ort().GetTensorElementType(info.get(), &type));
    if (type != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT)
      throw std::runtime_error("an output is not float32");

    size_t rank = 0;
    check(ort().GetDimensionsCount(info.get(), &rank));
    std::vector<int64_t> shape(rank);
    check(ort().GetDimensions(info.get(), shape.data(), rank));
    size_t count = 0;
    check(ort().GetTensorShapeElementCount(info.get(), &count));

    void* data = nullptr;
    check(ort().GetTensorMutableData(value, &data));
    const float* const values = static_cast<float*>(data);
    return {shape, {values, values + count}};
  }
};
