// What an ONNX file contains, read before onnxruntime sees it.
//
// A tensor may name a file that its weights are in, and old versions of onnxruntime open any file
// that it names: one file of a stranger could show the content of another. step2_export.py writes
// no such tensors.

#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

using std::string;

// The messages of onnx.proto3 in which there are tensors.
enum class Message { model, training, function, graph, node, attribute, sparse_tensor, tensor };

// (message, number of a field) -> what the field contains.
inline const std::map<std::pair<Message, uint32_t>, Message> PARTS = {
    {{Message::model, 7}, Message::graph},
    {{Message::model, 20}, Message::training},
    {{Message::model, 25}, Message::function},
    {{Message::training, 1}, Message::graph},  // initialization
    {{Message::training, 2}, Message::graph},  // algorithm
    {{Message::function, 7}, Message::node},
    {{Message::function, 11}, Message::attribute},
    {{Message::graph, 1}, Message::node},
    {{Message::graph, 5}, Message::tensor},  // initializer
    {{Message::graph, 15}, Message::sparse_tensor},
    {{Message::node, 5}, Message::attribute},
    {{Message::attribute, 5}, Message::tensor},
    {{Message::attribute, 6}, Message::graph},
    {{Message::attribute, 10}, Message::tensor},
    {{Message::attribute, 11}, Message::graph},
    {{Message::attribute, 22}, Message::sparse_tensor},
    {{Message::attribute, 23}, Message::sparse_tensor},
    {{Message::sparse_tensor, 1}, Message::tensor},  // values
    {{Message::sparse_tensor, 2}, Message::tensor},  // indices
};
constexpr uint32_t EXTERNAL_DATA = 13;  // of a tensor
constexpr uint32_t DATA_LOCATION = 14;  // of a tensor: 0 in this file, 1 in another

// A field of a message.
struct Field {
  uint32_t number;
  bool has_content;        // whether it is bytes, which may be a message
  const uint8_t* content;  // those bytes
  size_t size;
  uint64_t value;  // of a field that is a whole number
};

// Reads the fields of a protobuf message. It is strict: what it does not understand might be read
// in another way by onnxruntime.
class Fields {
  const uint8_t* at;
  const uint8_t* end;

 public:
  Fields(const uint8_t* begin, size_t size) : at(begin), end(begin + size) {}

  // The next field, or nothing at the end. Throws std::runtime_error.
  std::optional<Field> next() {
    if (at == end) return {};

    const uint64_t tag = varint();
    Field field{uint32_t(tag) >> 3, false, nullptr, 0, 0};
    switch (tag & 7) {
      case 0:
        field.value = varint();
        break;
      case 1:
        skip(8);
        break;
      case 2:
        field.has_content = true;
        field.size = varint();
        field.content = at;
        skip(field.size);
        break;
      case 5:
        skip(4);
        break;
      default:  // groups, which ONNX does not have
        throw damaged();
    }
    return field;
  }

 private:
  static std::runtime_error damaged() { return std::runtime_error("its protobuf is damaged"); }

  // Seven bits a byte, the lowest first; the highest bit says whether more bytes follow.
  uint64_t varint() {
    uint64_t value = 0;
    for (int shift = 0; shift < 64; shift += 7) {
      if (at == end) throw damaged();

      const uint8_t byte = *at++;
      value |= uint64_t(byte & 127) << shift;
      if (byte < 128) return value;
    }
    throw damaged();
  }

  void skip(uint64_t size) {
    if (size > uint64_t(end - at)) throw damaged();
    at += size;
  }
};

// Whether a tensor of an ONNX file has its weights in another file. Throws std::runtime_error for
// bytes that are not such a file.
inline bool has_external_data(const string& bytes) {
  struct Part {
    Message message;
    const uint8_t* content;
    size_t size;
  };
  const auto* begin = reinterpret_cast<const uint8_t*>(bytes.data());
  std::vector<Part> waiting = {{Message::model, begin, bytes.size()}};  // no recursion: any depth

  while (!waiting.empty()) {
    const Part part = waiting.back();
    waiting.pop_back();

    Fields fields(part.content, part.size);
    while (const auto field = fields.next()) {
      const bool is_tensor = part.message == Message::tensor;
      if (is_tensor && field->number == EXTERNAL_DATA) return true;
      if (is_tensor && field->number == DATA_LOCATION && field->value != 0) return true;

      const auto below = PARTS.find({part.message, field->number});
      if (field->has_content && below != PARTS.end())
        waiting.push_back({below->second, field->content, field->size});
    }
  }
  return false;
}
