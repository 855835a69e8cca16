// The spec inside a model file, by the rules of inference/spec.py: what one reader refuses, the
// others refuse, too. A new key that this program relies on is a line in the tables of rules.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "problem.h"
#include "text.h"

using nlohmann::json;

constexpr int SCHEMA = 1;  // the newest that this program understands

// Of the self-test, in files that do not say: the largest difference of an output, and of `known`.
constexpr double FLOAT_TOLERANCE = 1e-4;
constexpr double INT8_TOLERANCE = 2e-2;  // processors round int8 products differently
constexpr double KNOWN_TOLERANCE = 5e-3;

// Limits that no file of step2_export.py reaches.
constexpr size_t MAX_BYTES = size_t(32) << 20;   // of the spec's text
constexpr int MAX_DEPTH = 16;                    // of lists and objects inside each other
constexpr int64_t MAX_WHOLE = int64_t(1) << 53;  // which JavaScript still counts exactly
constexpr size_t MAX_NAME = 256;                 // characters of a class name
constexpr size_t MAX_GOLDEN = 64;                // samples
constexpr int64_t MAX_NETWORK_SIDE = 4096;       // pixels that the network sees
constexpr int64_t MAX_BATCH = 1024;
constexpr size_t MAX_PROMISES = 1024;
constexpr int64_t MAX_FIXED_VALUES = int64_t(1) << 28;  // of the input of a file of fixed size
constexpr double MAX_TOLERANCE = 5e-2;  // of the self-test: more would pass anything

// From which probability of its own a class is the answer, whatever the others are.
struct Recall {
  size_t class_number;
  double threshold;
};

// What this program needs of the spec.
struct Spec {
  std::vector<string> classes;
  int channels;
  int white;  // the level of 16-bit pixels that becomes 255
  std::optional<int> ground;  // the grey level under transparent pixels
  bool has_known;
  std::optional<double> reject;
  std::optional<double> min_probability;
  double promised_probability;  // below it an answer is unsure, besides min_probability
  std::vector<Recall> recalls;  // the first whose threshold is reached is the answer
  json golden;  // the samples of the self-test
  double tolerance;
  double known_tolerance;
};

// ----------------------------------------------------------------------------------- any JSON

// JSON that nlohmann reads and other readers do not, or that no honest file contains.
struct Refused : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Throws Refused while JSON is read, before it is in memory. `true` means: go on.
class Limits : public nlohmann::json_sax<json> {
  int depth = 0;  // how many lists and objects are open

  bool value() const {
    if (depth >= MAX_DEPTH)
      throw Refused("it is more than " + std::to_string(MAX_DEPTH) + " levels deep");
    return true;
  }

  bool open() {
    value();
    ++depth;
    return true;
  }

  bool close() {
    --depth;
    return true;
  }

  static void too_large() { throw Refused("it contains a number that is too large"); }

 public:
  bool null() override { return value(); }
  bool boolean(bool) override { return value(); }
  bool string(string_t&) override { return value(); }
  bool binary(binary_t&) override { return value(); }
  bool key(string_t&) override { return value(); }
  bool start_object(size_t) override { return open(); }
  bool start_array(size_t) override { return open(); }
  bool end_object() override { return close(); }
  bool end_array() override { return close(); }

  bool number_integer(number_integer_t number) override {
    if (number < -MAX_WHOLE || number > MAX_WHOLE) too_large();
    return value();
  }

  bool number_unsigned(number_unsigned_t number) override {
    if (number > number_unsigned_t(MAX_WHOLE)) too_large();
    return value();
  }

  // A whole number of more than 64 bits arrives here as well.
  bool number_float(number_float_t number, const string_t& text) override {
    const bool is_whole = text.find_first_of(".eE") == string_t::npos;
    if (is_whole || !std::isfinite(number)) too_large();
    return value();
  }

  bool parse_error(size_t, const std::string&, const nlohmann::detail::exception& error) override {
    constexpr int NUMBER_OVERFLOW = 406;
    if (error.id == NUMBER_OVERFLOW) too_large();
    return false;
  }
};

// The object that JSON text describes. Throws Refused.
inline json read_object(const string& text) {
  if (text.size() > MAX_BYTES)
    throw Refused("it has more than " + std::to_string(MAX_BYTES >> 20) + " MiB");

  // nlohmann skips a byte order mark, Python does not.
  Limits limits;
  const bool has_mark = text.compare(0, 3, "\xEF\xBB\xBF") == 0;
  if (has_mark || !json::sax_parse(text, &limits)) throw Refused("it is not a JSON object");

  json object = json::parse(text);
  if (!object.is_object()) throw Refused("it is not a JSON object");
  return object;
}

// -------------------------------------------------------------------------------------- rules

// `true` and 1.0 are no whole numbers.
inline bool is_whole(const json& value, int64_t low, int64_t high = int64_t(1) << 31) {
  if (!value.is_number_integer()) return false;

  const auto number = value.get<int64_t>();
  return low <= number && number <= high;
}

inline bool is_text(const json& value, const std::vector<string>& allowed) {
  if (!value.is_string()) return false;
  return std::find(allowed.begin(), allowed.end(), value.get<string>()) != allowed.end();
}

// A number that is not negative.
inline bool is_amount(const json& value) { return value.is_number() && value.get<double>() >= 0; }

inline bool is_share(const json& value) {
  return value.is_null() || (is_amount(value) && value.get<double>() <= 1);
}

inline bool is_name(const json& value) {
  if (!value.is_string()) return false;

  const size_t length = count_characters(value.get<string>());
  return length >= 1 && length <= MAX_NAME;
}

// A list of `least` different names or more.
inline bool are_names(const json& value, size_t least) {
  if (!value.is_array() || value.size() < least) return false;
  if (!std::all_of(value.begin(), value.end(), is_name)) return false;

  const auto names = value.get<std::vector<string>>();
  const std::set<string> different(names.begin(), names.end());
  return different.size() == names.size();
}

inline bool is_size(const json& value) {
  if (!value.is_array() || value.size() != 2) return false;
  return is_whole(value[0], 1, MAX_NETWORK_SIDE) && is_whole(value[1], 1, MAX_NETWORK_SIDE);
}

inline bool is_known(const json& value) {
  if (value.is_null()) return true;
  return value.is_object() && is_amount(value.value("tolerance", json(KNOWN_TOLERANCE)));
}

inline bool is_fixed(const json& value) {
  if (value.is_null()) return true;
  if (!value.is_object() || !value.contains("batch") || !value.contains("input")) return false;

  const json& batch = value["batch"];
  const bool is_batch = batch.is_null() || is_whole(batch, 1, MAX_BATCH);
  return is_batch && is_text(value["input"], {"uint8", "float32"});
}

inline bool are_golden(const json& value) {
  if (!value.is_array() || value.size() > MAX_GOLDEN) return false;
  return std::all_of(value.begin(), value.end(), [](const json& one) { return one.is_object(); });
}

inline bool is_promise(const json& value) {
  if (!value.is_object()) return false;

  const json kind = value.value("kind", json());
  if (!is_text(kind, {"accuracy", "recall"})) return false;
  if (kind == "recall" && !is_name(value.value("name", json()))) return false;

  const json threshold = value.value("threshold", json());
  const json share = value.value("share", json());
  return !threshold.is_null() && is_share(threshold) && !share.is_null() && is_share(share);
}

inline bool are_promises(const json& value) {
  if (value.is_null()) return true;
  if (!value.is_array() || value.size() > MAX_PROMISES) return false;
  return std::all_of(value.begin(), value.end(), is_promise);
}

struct Rule {
  const char* key;
  bool (*is_valid)(const json& value);
  string wanted;
};

inline const std::vector<Rule> RULES = {
    {"schema", [](const json& value) { return is_whole(value, 1); }, "a whole number"},
    {"task",
     [](const json& value) { return is_text(value, {"classification", "regression"}); },
     "classification or regression"},
    {"classes",
     [](const json& value) { return are_names(value, 1); },
     "a list of different names of 1 to " + std::to_string(MAX_NAME) + " characters"},
    {"channels", [](const json& value) { return is_whole(value, 1); }, "a whole number"},
    {"white",
     [](const json& value) { return is_whole(value, 1, 65535); },
     "a whole number from 1 to 65535"},
    {"ground",
     [](const json& value) { return value.is_null() || is_text(value, {"white", "black"}); },
     "white, black or null"},
    {"known", is_known, "null, or an object whose tolerance is a number"},
    {"reject", is_share, "a number from 0 to 1, or null"},
    {"min_probability", is_share, "a number from 0 to 1, or null"},
    {"promises",
     are_promises,
     "null, or a list of at most " + std::to_string(MAX_PROMISES) +
         " promises, each with a kind (accuracy or recall), a threshold and a share from 0 to 1 "
         "and, of recall, a name"},
    {"fit",
     [](const json& value) {
       return value.is_null() || is_text(value, {"stretch", "crop", "letterbox"});
     },
     "stretch, crop, letterbox or null"},
    {"fixed",
     is_fixed,
     "null, or a batch (1 to " + std::to_string(MAX_BATCH) +
         ", or null) and an input (uint8 or float32)"},
    {"golden", are_golden, "a list of at most " + std::to_string(MAX_GOLDEN) + " samples"},
    {"self_test_tolerance",
     [](const json& value) { return value.is_null() || is_amount(value); },
     "a number from 0, or null"},
};

inline const std::vector<Rule> IMAGE_RULES = {
    {"classes",
     [](const json& value) { return are_names(value, 2); },
     "two different names or more"},
    {"channels",
     [](const json& value) { return is_whole(value, 1, 1) || is_whole(value, 3, 3); },
     "1 or 3"},
    {"image_size",
     is_size,
     "[height, width], each from 1 to " + std::to_string(MAX_NETWORK_SIDE)},
};

// Keys that older files lack.
inline const json DEFAULTS = {
    {"fit", nullptr},
    {"white", 65535},
    {"ground", nullptr},
    {"known", nullptr},
    {"reject", nullptr},
    {"min_probability", nullptr},
    {"promises", nullptr},
    {"fixed", nullptr},
    {"golden", json::array()},
    {"self_test_tolerance", nullptr},
};

// ------------------------------------------------------------------------------------ reading

// Throws Problem for the first key that is missing or breaks its rule.
inline void validate(const json& spec, const std::vector<Rule>& rules, const string& malformed) {
  for (const Rule& rule : rules) {
    if (!spec.contains(rule.key)) throw Problem(malformed + ": " + rule.key + " is missing");
    if (!rule.is_valid(spec[rule.key]))
      throw Problem(malformed + ": " + rule.key + " must be " + rule.wanted);
  }
}

// Throws Problem if the only input size of a file would not fit into memory.
inline void check_fixed_size(const json& spec, const string& malformed) {
  const json& fixed = spec["fixed"];
  if (fixed.is_null()) return;

  int64_t values = fixed["batch"].is_null() ? 1 : fixed["batch"].get<int64_t>();
  values *= spec["image_size"][0].get<int64_t>();
  values *= spec["image_size"][1].get<int64_t>();
  values *= spec["channels"].get<int64_t>();
  if (values > MAX_FIXED_VALUES)
    throw Problem(malformed + ": its fixed input has " + grouped(values) + " values");
}

// The largest difference that the self-test allows of an output.
inline double tolerance_of(const json& spec) {
  double tolerance = spec.contains("quantization") ? INT8_TOLERANCE : FLOAT_TOLERANCE;
  if (!spec["self_test_tolerance"].is_null())
    tolerance = spec["self_test_tolerance"].get<double>();
  return std::min(tolerance, MAX_TOLERANCE);
}

inline std::optional<double> optional_number(const json& value) {
  if (value.is_null()) return {};
  return value.get<double>();
}

// Takes the thresholds of the promises. Throws Problem for a class that the file does not have.
inline void read_promises(const json& promises, const string& malformed, Spec& read) {
  read.promised_probability = 0;
  if (promises.is_null()) return;

  for (const json& promise : promises) {
    const double threshold = promise["threshold"].get<double>();
    if (promise["kind"] == "accuracy") {
      read.promised_probability = std::max(read.promised_probability, threshold);
      continue;
    }

    const auto first = read.classes.begin();
    const auto found = std::find(first, read.classes.end(), promise["name"].get<string>());
    if (found == read.classes.end())
      throw Problem(malformed + ": a promise names a class that the file does not have");
    read.recalls.push_back({size_t(found - first), threshold});
  }
}

// Parses and validates the spec that the file `path` carries; other_file: what to use instead of a
// file of fixed size. Throws Problem if there is none, if it needs another program, or naming the
// first key that is wrong.
inline Spec read_spec(const string& text, const string& path, const string& other_file) {
  if (text.empty()) throw Problem(path + " carries no spec: it was not made by step2_export.py");
  const string malformed = path + " has a malformed spec";

  json spec = DEFAULTS;
  try {
    spec.update(read_object(text));
  } catch (const Refused& refused) {
    throw Problem(malformed + ": " + refused.what());
  }

  if (is_whole(spec.value("schema", json()), SCHEMA + 1))
    throw Problem(path + " has a spec of schema " + spec["schema"].dump() +
                  ", this program knows up to " + std::to_string(SCHEMA) +
                  ": use the program of the Threestep version that exported it");

  validate(spec, RULES, malformed);
  if (spec["task"] == "regression")
    throw Problem(path + " is a regression model: use step3_infer.py --values", 2);

  validate(spec, IMAGE_RULES, malformed);
  check_fixed_size(spec, malformed);
  const json& known = spec["known"];
  if (!spec["reject"].is_null() && known.is_null())
    throw Problem(malformed + ": reject needs known, which the file does not have");
  if (!spec["fixed"].is_null())
    throw Problem(path + " takes resized images only: use " + other_file + ", which resizes", 2);

  Spec read;
  read.classes = spec["classes"].get<std::vector<string>>();
  read.channels = spec["channels"].get<int>();
  read.white = spec["white"].get<int>();
  if (!spec["ground"].is_null()) read.ground = spec["ground"] == "white" ? 255 : 0;
  read.has_known = !known.is_null();
  read.reject = optional_number(spec["reject"]);
  read.min_probability = optional_number(spec["min_probability"]);
  read_promises(spec["promises"], malformed, read);
  read.golden = spec["golden"];
  read.tolerance = tolerance_of(spec);
  read.known_tolerance = 0;
  if (read.has_known)
    read.known_tolerance = std::min(known.value("tolerance", KNOWN_TOLERANCE), MAX_TOLERANCE);
  return read;
}
