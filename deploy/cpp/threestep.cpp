// Predicts from a file of step2_export.py as step3_infer.py does, without Python: from a model.onnx with
// onnxruntime or from a model.pt with LibTorch, whichever it was built with (backend.h).
//
//     threestep --model model.onnx --top-k 3 photos/ 'more/*.jpg'
//     threestep --format json photos/ > predictions.jsonl
//     threestep --self-test                  # does this machine compute what the training machine did?
//
// Resizing, normalising and softmax are inside the file, and so are the class names, in its spec. This
// program decodes an image to uint8 [1, height, width, channels], runs the model and prints the prediction.
// Exit codes: 0 done, 1 some input could not be used, 2 usage.

#include <cmath>
#include <cstdio>
#include <iostream>
#include <map>
#include <nlohmann/json.hpp>
#include <numeric>
#include <optional>
#include <thread>

#include "backend.h"
#include "image.h"
#include "text.h"

using nlohmann::json;

constexpr int SCHEMA = 1;                 // the newest spec that this program understands
constexpr double FLOAT_TOLERANCE = 1e-4;  // of the self-test, if the spec has no self_test_tolerance
constexpr double INT8_TOLERANCE = 2e-2;   // processors round int8 products differently

string usage() {
  const string model = "default: " + MODELS[0] + " beside this program, else in the current directory";
  return "usage: threestep [--model FILE] [--threads N] [--format text|json] [--top-k K]\n"
         "                 [--reject X] [--min-probability P] [--self-test] [PATH ...]\n\n"
         "Predict from " + FORMAT + " (" + SUFFIX + ") of step2_export.py, with " + engine() + ".\n\n"
         "  PATH                 image files (PNG, JPEG, BMP, GIF), directories (recursively), globs\n"
         "  --model FILE         " + model + "\n"
         "  --threads N          CPU threads (default: as many as this process may use)\n"
         "  --format F           text, or json: one object per line (default: text)\n"
         "  --top-k K            classes to print, most probable first (default: 3)\n"
         "  --reject X           keep this share of images like those trained on, such as 0.99;\n"
         "                       call others unknown (default: the file's own, or none)\n"
         "  --min-probability P  call answers with less probability unsure (default: likewise)\n"
         "  --self-test          run the golden samples inside the file and compare\n";
}

struct Options {
  std::vector<string> paths;
  string model, format = "text";
  int threads = 0, top_k = 3;
  std::optional<double> reject, min_probability;
  bool self_test = false, help = false;
};

// The first line of an exception's message.
string reason(const std::exception& error) {
  const string text = message(error);
  return text.substr(0, text.find('\n'));
}

void say(const string& message) { std::cerr << printable(message) << std::endl; }

// ----------------------------------------------------------------------------------------------------- model

struct Model {
  string path;
  Network network;
  json spec;
  std::vector<string> classes;
  int channels, white;  // white: the level of 16-bit greys that becomes 255
  bool has_known;       // whether the file says how familiar an image looks; older ones do not
  double known_tolerance;
  std::optional<double> reject, min_probability;  // the thresholds: the file's own, or the user's
};

struct Answer {
  std::vector<float> probabilities;  // [classes]
  std::optional<float> known;        // the share of images like those trained on that look less familiar
};

// A share, or nothing if the spec has none of this name. Throws json::exception or Problem.
std::optional<double> share(const Model& model, const char* name) {
  if (!model.spec.contains(name) || model.spec[name].is_null()) return {};
  const double value = model.spec[name].get<double>();
  if (value < 0 || value > 1) throw Problem(model.path + " has a malformed spec: " + name + " is not 0 to 1");
  return value;
}

// Reads the spec of the file into the model. Throws Problem if it is missing, malformed or too new.
void read_spec(Model& model) {
  const string& text = model.network.spec;
  if (text.empty()) throw Problem(model.path + " carries no spec: it was not made by step2_export.py");
  try {
    model.spec = json::parse(text);
    if (model.spec.at("schema").get<double>() > SCHEMA)
      throw Problem(model.path + " has a spec of schema " + model.spec["schema"].dump() +
                    ", this program knows up to " + std::to_string(SCHEMA) +
                    ": use the program of the Threestep version that exported it");
    if (model.spec.at("task") == "regression")
      throw Problem(model.path + " is a regression model: use step3_infer.py --values", 2);
    model.spec.at("classes").get_to(model.classes);
    model.spec.at("channels").get_to(model.channels);
    model.white = model.spec.value("white", 65535);
    if (model.spec["task"] != "classification" || model.classes.size() < 2 ||
        (model.channels != 1 && model.channels != 3) || model.white < 1 || model.white > 65535)
      throw Problem(model.path + " has a malformed spec: its task, classes, channels or white are invalid");
    if (!model.spec.value("fixed", json()).is_null())
      throw Problem(model.path + " takes resized images only: use " + MODELS[0] + ", which resizes", 2);
    const json known = model.spec.value("known", json());
    model.has_known = !known.is_null();
    model.known_tolerance = model.has_known ? known.at("tolerance").get<double>() : 0;
    model.reject = share(model, "reject");
    model.min_probability = share(model, "min_probability");
    if (model.known_tolerance < 0 || (model.reject && !model.has_known))
      throw Problem(model.path + " has a malformed spec: its known cannot be used");
  } catch (const json::exception& error) {
    throw Problem(model.path + " has a malformed spec: " + error.what());
  }
}

// Throws Problem if the name says that the file is for another build of this program, or for none.
void check_suffix(const string& path) {
  static const std::map<string, string> programs = {
      {".onnx", "the program built with -DBACKEND=onnxruntime"},
      {".pt", "the program built with -DBACKEND=torch"},
      {".pt2", "step3_infer.py"}};
  string suffix = fs::path(path).extension().string();
  for (char& c : suffix) c = std::tolower(static_cast<unsigned char>(c));
  const auto program = programs.find(suffix);
  if (suffix != SUFFIX && program != programs.end())
    throw Problem(path + " needs " + program->second + "; this program runs the " + SUFFIX +
                  " file of an export, with " + engine());
}

Network load_network(const string& path, int threads) {
  const int available = std::max(1, int(std::thread::hardware_concurrency()));
  try {
    return Network(path, threads ? std::min(threads, 1024) : available);
  } catch (const std::exception& error) {
    throw Problem(path + " is not " + FORMAT + " that " + engine() + " can run: " + reason(error));
  }
}

Model load(const string& path, int threads) {
  std::error_code error;
  if (!fs::is_regular_file(path, error))
    throw Problem("no model file " + path + "; python step2_export.py makes one");
  check_suffix(path);
  Model model{path, load_network(path, threads)};
  read_spec(model);
  return model;
}

// Runs the model on one image. Throws Problem.
Answer predict(Model& model, Image& image) {
  std::vector<Output> outputs;
  try {
    outputs = model.network.run(image.pixels.data(), image.height, image.width, model.channels);
  } catch (const std::exception& error) {
    throw Problem("the model cannot run on this input, its spec may be wrong: " + reason(error));
  }
  const size_t classes = model.classes.size(), count = outputs.empty() ? 0 : outputs[0].values.size();
  if (count == 0 || outputs[0].shape != std::vector<int64_t>{1, int64_t(classes)})
    throw Problem("the spec does not match the model: " + std::to_string(classes) + " classes, " +
                  std::to_string(count) + " outputs");
  if (model.has_known && (outputs.size() < 2 || outputs[1].values.size() != 1))
    throw Problem("the spec does not match the model: it does not fit the output known");
  Answer answer{outputs[0].values, {}};
  if (model.has_known) answer.known = outputs[1].values[0];
  return answer;
}

// The larger of two differences; NaN counts as larger than any number.
double larger(double a, double b) { return std::isnan(a) || a > b ? a : b; }

// The largest differences from the expected outputs: of probabilities, relative above 1, and of known.
struct Differences {
  double probabilities = 0, known = 0;
};

// Runs one golden sample, and raises what it exceeds of `largest`.
void compare(const json& sample, Model& model, Differences& largest) {
  Image image = decode(base64_bytes(sample.at("image")), model.channels, model.white);
  const std::vector<double> expected = sample.at("probabilities");
  const Answer answer = predict(model, image);
  if (answer.probabilities.size() != expected.size()) throw Problem("wrong number of probabilities");
  for (size_t k = 0; k < expected.size(); k++) {
    const double difference = std::abs(answer.probabilities[k] - expected[k]);
    largest.probabilities = larger(difference / std::max(1.0, std::abs(expected[k])), largest.probabilities);
  }
  if (answer.known)
    largest.known = larger(std::abs(*answer.known - sample.at("known").get<double>()), largest.known);
}

// Runs the golden samples inside the file and compares the outputs with the expected ones; -> the exit code.
// The tolerances follow the rule of step3_infer.py and of the web page.
int self_test(Model& model) {
  const json golden = model.spec.value("golden", json::array());
  if (golden.empty()) throw Problem("this file carries no golden samples to test with");
  double tolerance = model.spec.contains("quantization") ? INT8_TOLERANCE : FLOAT_TOLERANCE;
  Differences largest;
  try {
    tolerance = model.spec.value("self_test_tolerance", tolerance);
    for (const json& sample : golden) compare(sample, model, largest);
  } catch (const std::exception& error) {
    throw Problem("this file's golden samples are malformed: " + reason(error));
  }
  const bool passed = largest.probabilities <= tolerance && largest.known <= model.known_tolerance;
  std::printf("self-test %s: %zu golden sample%s, max difference %.1e\n", passed ? "passed" : "FAILED",
              golden.size(), golden.size() == 1 ? "" : "s", largest.probabilities);
  return passed ? 0 : 1;
}

// ------------------------------------------------------------------------------------------------------- CLI

const char* const UNWRITABLE = "cannot write to standard output";
const char* const HELP = " (--help shows all options)";

// The model beside this program, else in the current directory. Throws Problem if there is none.
string find_model() {
  std::error_code error;  // without /proc, the program's directory is unknown
  const fs::path program = fs::read_symlink("/proc/self/exe", error);
  for (const fs::path& place : {program.parent_path(), fs::path()})
    for (const string& name : MODELS)
      if (fs::is_regular_file(place / name, error)) return (place / name).string();
  const string remedy = "; give --model, or run step2_export.py";
  throw Problem("no " + MODELS[0] + " beside this program or in the current directory" + remedy, 2);
}

// Reports an input that cannot be used: as an error line, and with --format json among the results; -> false.
bool report_error(const string& path, const string& message, const Options& options) {
  say("error: " + path + ": " + message);
  if (options.format == "json")
    std::cout << "{\"path\": " << quoted(path) << ", \"error\": " << quoted(message) << "}\n";
  return false;
}

// The answer for an image whose best guess this is; the numbers are rounded as they are written.
string judge(const Model& model, const string& guess, double probability, std::optional<double> known) {
  if (model.reject && known && *known < rounded(1 - *model.reject)) return "unknown";
  if (model.min_probability && probability < *model.min_probability) return "unsure";
  return guess;
}

// Writes the line of one image: its classes, most probable first, and how familiar it looks.
void write(const string& path, const Answer& answer, const Model& model, const Options& options) {
  const std::vector<float>& probabilities = answer.probabilities;
  std::vector<size_t> best(probabilities.size());
  std::iota(best.begin(), best.end(), 0);
  const auto more_probable = [&](size_t a, size_t b) { return probabilities[a] > probabilities[b]; };
  std::stable_sort(best.begin(), best.end(), more_probable);
  best.resize(std::min<size_t>(options.top_k, best.size()));
  const string& guess = model.classes[best[0]];
  const double probability = rounded(probabilities[best[0]]);
  const auto known = answer.known ? std::optional(rounded(*answer.known)) : std::nullopt;
  const string label = judge(model, guess, probability, known);
  if (options.format == "text") {
    std::cout << printable(path);
    if (label != guess) std::cout << "  " << label;
    for (const size_t k : best)
      std::cout << "  " << printable(model.classes[k]) << " " << percent(rounded(probabilities[k]), 2);
    if (known) std::cout << "  known " << percent(*known, 1);
    std::cout << "\n";
    return;
  }
  std::cout << "{\"path\": " << quoted(path) << ", \"label\": " << quoted(label)
            << ", \"probability\": " << json(probability)
            << ", \"known\": " << (known ? json(*known) : json()) << ", \"top\": [";
  for (const size_t k : best)
    std::cout << (k == best[0] ? "{" : ", {") << "\"label\": " << quoted(model.classes[k])
              << ", \"probability\": " << json(rounded(probabilities[k])) << "}";
  std::cout << "]}\n";
}

// Predicts one image, or reports why it cannot be used; -> whether it could.
bool predict_file(const string& path, Model& model, const Options& options) {
  Image image;
  try {
    image = decode(read_file(path), model.channels, model.white);
  } catch (const Problem& problem) {
    return report_error(path, problem.what(), options);
  } catch (const std::bad_alloc&) {
    return report_error(path, "is too large for this machine's memory", options);
  }
  const Answer answer = predict(model, image);
  for (const float probability : answer.probabilities)
    if (!std::isfinite(probability))
      return report_error(path, "the model computes NaN or infinity for this image", options);
  write(path, answer, model, options);
  return true;
}

// The value of an option that counts something. Throws Problem.
int positive(const string& option, const string& text) {
  const bool digits = !text.empty() && text.find_first_not_of("0123456789") == string::npos;
  if (!digits || text.size() > 6 || std::stoi(text) < 1)
    throw Problem("argument " + option + ": '" + text + "' is not a whole number from 1 to 999999" + HELP, 2);
  return std::stoi(text);
}

// The value of an option that is a share of 1. Throws Problem.
double fraction(const string& option, const string& text) {
  const char* const end = text.c_str() + text.size();  // strtod alone also takes spaces, hexadecimals and inf
  char* stop = nullptr;
  const double value = std::strtod(text.c_str(), &stop);
  const bool number = !text.empty() && text.find_first_not_of("0123456789.eE+-") == string::npos;
  if (!number || stop != end || value < 0 || value > 1)
    throw Problem("argument " + option + ": '" + text + "' is not a number from 0 to 1" + HELP, 2);
  return value;
}

Options parse(const std::vector<string>& arguments) {
  Options options;
  bool only_paths = false;
  for (size_t k = 0; k < arguments.size(); k++) {
    const string &argument = arguments[k], option = argument.substr(0, argument.find('='));
    const auto value = [&] {
      if (option.size() < argument.size()) return argument.substr(option.size() + 1);
      if (k + 1 == arguments.size())
        throw Problem("argument " + option + ": expected one argument" + HELP, 2);
      return arguments[++k];
    };
    if (only_paths || argument.size() < 2 || argument[0] != '-')
      options.paths.push_back(argument);
    else if (argument == "--")
      only_paths = true;
    else if (option == "--model")
      options.model = value();
    else if (option == "--threads")
      options.threads = positive(option, value());
    else if (option == "--top-k")
      options.top_k = positive(option, value());
    else if (option == "--reject")
      options.reject = fraction(option, value());
    else if (option == "--min-probability")
      options.min_probability = fraction(option, value());
    else if (option == "--format")
      options.format = value();
    else if (argument == "--self-test")
      options.self_test = true;
    else if (argument == "--help" || argument == "-h")
      options.help = true;
    else
      throw Problem("unrecognized arguments: " + argument + HELP, 2);
  }
  if (options.format != "text" && options.format != "json")
    throw Problem("argument --format: '" + options.format + "' is neither text nor json" + HELP, 2);
  if (options.paths.empty() && !options.self_test && !options.help)
    throw Problem(string("give at least one PATH: an image, a directory or a glob") + HELP, 2);
  return options;
}

// The work of main; -> the exit code.
int run(const std::vector<string>& arguments) {
  Options options = parse(arguments);
  if (options.help) {
    std::cout << usage();
    return 0;
  }
  if (options.model.empty()) {
    options.model = find_model();
    say("model: " + options.model);
  }
  Model model = load(options.model, options.threads);
  if (options.self_test) return self_test(model);
  if (options.reject && !model.has_known)
    throw Problem(model.path + " does not say how familiar an image looks: --reject cannot be used", 2);
  if (options.reject) model.reject = options.reject;
  if (options.min_probability) model.min_probability = options.min_probability;
  bool complete = true;
  for (const string& given : options.paths) {
    std::vector<string> found;
    try {
      found = find_images(given);
    } catch (const Problem& problem) {
      complete = report_error(given, problem.what(), options);
    }
    for (const string& path : found) {
      complete = predict_file(path, model, options) && complete;
      if (!std::cout) throw Problem(UNWRITABLE);  // do not compute results that cannot be written
    }
  }
  return complete ? 0 : 1;
}

int main(int count, char** values) {
  int code = 1;
  try {
    code = run({values + 1, values + count});
    if (!std::cout.flush()) throw Problem(UNWRITABLE);
  } catch (const Problem& problem) {
    say(string("error: ") + problem.what());
    code = problem.code;
  } catch (const std::bad_alloc&) {
    say("error: not enough memory");
  } catch (const std::exception& error) {
    say("error: " + reason(error));
  }
  return code;
}
