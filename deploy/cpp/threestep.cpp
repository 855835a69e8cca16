// Predicts from a file of step2_export.py as step3_infer.py does, without Python: from a model.onnx
// with onnxruntime or from a model.pt with LibTorch, whichever it was built with (backend.h).
//
//     threestep --model model.onnx --top-k 3 photos/ 'more/*.jpg'
//     threestep --format json photos/ > predictions.jsonl
//     threestep --self-test             # does this machine compute what the training machine did?
//
// Resizing, normalising and softmax are inside the file, and so are the class names, in its spec.
// This program decodes an image to uint8 [1, height, width, channels], runs the model and prints
// the prediction. Exit codes: 0 done, 1 some input could not be used, 2 usage.

#include <cmath>
#include <cstdio>
#include <iostream>
#include <map>
#include <nlohmann/json.hpp>
#include <numeric>
#include <optional>
#include <thread>

#include "backend.h"
#include "files.h"
#include "image.h"
#include "problem.h"
#include "spec.h"
#include "text.h"

using nlohmann::json;

constexpr float TOLERATED = 1e-3f;  // beyond 0..1, of a probability of an int8 file

string usage() {
  const string runs = FORMAT + " (" + SUFFIX + ") of step2_export.py, with " + engine();
  const string model = MODELS[0] + " beside this program, else in the current directory";
  return "usage: threestep [--model FILE] [--threads N] [--format text|json] [--top-k K]\n"
         "                 [--reject X] [--min-probability P] [--max-pixels N] [--self-test]\n"
         "                 [PATH ...]\n"
         "\n"
         "Predict from " + runs + ".\n"
         "\n"
         "  PATH                 image files (PNG, JPEG, BMP, GIF), directories, globs\n"
         "  --model FILE         default: " + model + "\n"
         "  --threads N          CPU threads (default: as many as this process may use)\n"
         "  --format F           text, or json: one object per line (default: text)\n"
         "  --top-k K            classes to print, most probable first (default: 3)\n"
         "  --reject X           keep this share of images like those trained on, such as 0.99;\n"
         "                       call others unknown (default: the file's own, or none)\n"
         "  --min-probability P  call answers with less probability unsure (default: likewise)\n"
         "  --max-pixels N       refuse larger images (default: " + grouped(MAX_PIXELS) + ")\n"
         "  --self-test          run the golden samples inside the file and compare\n";
}

struct Options {
  std::vector<string> paths;
  string model;
  string format = "text";
  int threads = 0;  // 0: as many as this process may use
  int top_k = 3;
  int64_t max_pixels = MAX_PIXELS;
  std::optional<double> reject;
  std::optional<double> min_probability;
  bool self_test = false;
  bool help = false;
};

// The first line of an exception's message.
string reason(const std::exception& error) {
  const string text = message(error);
  return text.substr(0, text.find('\n'));
}

void say(const string& message) { std::cerr << printable(message) << std::endl; }

// --------------------------------------------------------------------------------------- model

struct Model {
  string path;
  Network network;
  Spec spec;
  size_t transparent = 0;  // images with pixels that were not opaque
};

struct Answer {
  std::vector<float> probabilities;  // [classes]
  // The share of images like those trained on that look less familiar; older files do not say it.
  std::optional<float> known;
};

// Throws Problem if the name says that the file is for another build of this program, or for none.
void check_suffix(const string& path) {
  static const std::map<string, string> programs = {
      {".onnx", "the program built with -DBACKEND=onnxruntime"},
      {".pt", "the program built with -DBACKEND=torch"},
      {".pt2", "step3_infer.py"}};

  const string suffix = suffix_of(path);
  const auto program = programs.find(suffix);
  if (suffix != SUFFIX && program != programs.end())
    throw Problem(path + " needs " + program->second + "; this program runs the " + SUFFIX +
                  " file of an export, with " + engine());
}

Network load_network(const string& path, int threads) {
  const int available = std::max(1, int(std::thread::hardware_concurrency()));
  try {
    return Network(path, threads ? std::min(threads, 1024) : available);
  } catch (const Problem&) {
    throw;
  } catch (const std::exception& error) {
    throw Problem(path + " is not " + FORMAT + " that " + engine() + " can run: " + reason(error));
  }
}

Model load(const string& path, int threads) {
  std::error_code error;
  if (!fs::is_regular_file(path, error))
    throw Problem("no model file " + path + "; python step2_export.py makes one");

  check_suffix(path);
  Network network = load_network(path, threads);
  Spec spec = read_spec(network.spec, path, MODELS[0]);
  return {path, std::move(network), std::move(spec)};
}

// Runs the model on one image. Throws Problem, std::bad_alloc.
Answer predict(Model& model, Image& image) {
  const Spec& spec = model.spec;
  std::vector<Output> outputs;
  try {
    outputs = model.network.run(image.pixels.data(), image.height, image.width, spec.channels);
  } catch (const std::bad_alloc&) {
    throw;
  } catch (const std::exception& error) {
    throw Problem("the model cannot run on this input, its spec may be wrong: " + reason(error));
  }

  const size_t classes = spec.classes.size();
  const size_t count = outputs.empty() ? 0 : outputs[0].values.size();
  if (count == 0 || outputs[0].shape != std::vector<int64_t>{1, int64_t(classes)})
    throw Problem("the spec does not match the model: " + std::to_string(classes) + " classes, " +
                  std::to_string(count) + " outputs");
  if (spec.has_known && (outputs.size() < 2 || outputs[1].values.size() != 1))
    throw Problem("the spec does not match the model: it does not fit the output known");

  Answer answer{outputs[0].values, {}};
  if (spec.has_known) answer.known = outputs[1].values[0];
  return answer;
}

// Throws Problem for shares that no honest model computes.
void check_shares(const Answer& answer) {
  std::vector<float> shares = answer.probabilities;
  if (answer.known) shares.push_back(*answer.known);

  const auto is_finite = [](float share) { return std::isfinite(share); };
  if (!std::all_of(shares.begin(), shares.end(), is_finite))
    throw Problem("the model computes NaN or infinity for this image");

  const auto is_share = [](float share) { return share >= -TOLERATED && share <= 1 + TOLERATED; };
  if (!std::all_of(shares.begin(), shares.end(), is_share))
    throw Problem("the model computes probabilities outside 0..1 for this image");
}

// ----------------------------------------------------------------------------------- self-test

// The larger of two differences; NaN counts as larger than any number.
double larger(double a, double b) { return std::isnan(a) || a > b ? a : b; }

// The largest differences from the expected outputs: of probabilities, relative above 1, and of
// known.
struct Differences {
  double probabilities = 0;
  double known = 0;
};

// Runs one golden sample, and raises what it exceeds of `largest`.
void compare(const json& sample, Model& model, Differences& largest) {
  const string file = base64_bytes(sample.at("image"));
  const Spec& spec = model.spec;
  Image image = decode(file, spec.channels, spec.white, spec.ground, MAX_PIXELS);
  const Answer answer = predict(model, image);

  const std::vector<double> expected = sample.at("probabilities");
  if (answer.probabilities.size() != expected.size())
    throw Problem("wrong number of probabilities");
  for (size_t k = 0; k < expected.size(); k++) {
    const double difference = std::abs(answer.probabilities[k] - expected[k]);
    const double relative = difference / std::max(1.0, std::abs(expected[k]));
    largest.probabilities = larger(relative, largest.probabilities);
  }

  if (answer.known) {
    const double difference = std::abs(*answer.known - sample.at("known").get<double>());
    largest.known = larger(difference, largest.known);
  }
}

// Runs the golden samples inside the file and compares the outputs with the expected ones; -> the
// exit code. The tolerances follow the rule of step3_infer.py and of the web page.
int self_test(Model& model) {
  const json& golden = model.spec.golden;
  if (golden.empty()) throw Problem("this file carries no golden samples to test with");

  Differences largest;
  try {
    for (const json& sample : golden) compare(sample, model, largest);
  } catch (const std::exception& error) {
    throw Problem("this file's golden samples are malformed: " + reason(error));
  }

  const bool passed = largest.probabilities <= model.spec.tolerance &&
                      largest.known <= model.spec.known_tolerance;
  std::printf("self-test %s: %zu golden sample%s, max difference %.1e\n",
              passed ? "passed" : "FAILED", golden.size(), golden.size() == 1 ? "" : "s",
              largest.probabilities);
  return passed ? 0 : 1;
}

// ------------------------------------------------------------------------------------- results

// Reports an input that cannot be used: as an error line, and with --format json among the results;
// -> false.
bool report_error(const string& path, const string& message, const Options& options) {
  say("error: " + path + ": " + message);
  if (options.format == "json")
    std::cout << "{\"path\": " << quoted(path) << ", \"error\": " << quoted(message) << "}\n";
  return false;
}

// What is answered, and the probability of the class that is, or of the best guess.
struct Verdict {
  string label;
  double probability;
};

// The answer for an image whose best guess is this class. All numbers are compared as they are
// written.
Verdict judge(const Spec& spec, const Answer& answer, size_t guess) {
  const double probability = rounded(answer.probabilities[guess]);
  if (spec.reject && answer.known && rounded(*answer.known) < rounded(1 - *spec.reject))
    return {"unknown", probability};

  for (const Recall& recall : spec.recalls) {
    const double own = rounded(answer.probabilities[recall.class_number]);
    if (own >= recall.threshold) return {spec.classes[recall.class_number], own};
  }

  const double least = std::max(spec.min_probability.value_or(0), spec.promised_probability);
  return {probability < least ? "unsure" : spec.classes[guess], probability};
}

// The numbers of the `count` most probable classes, the most probable first.
std::vector<size_t> rank(const std::vector<float>& probabilities, size_t count) {
  std::vector<size_t> best(probabilities.size());
  std::iota(best.begin(), best.end(), 0);
  std::stable_sort(best.begin(), best.end(), [&](size_t a, size_t b) {
    return probabilities[a] > probabilities[b];
  });
  best.resize(std::min(count, best.size()));
  return best;
}

// Writes the line of one image: its classes, most probable first, and how familiar it looks.
void write(const string& path, const Answer& answer, const Spec& spec, const Options& options) {
  const std::vector<size_t> best = rank(answer.probabilities, options.top_k);
  const string& guess = spec.classes[best[0]];
  std::optional<double> known;
  if (answer.known) known = rounded(*answer.known);
  const auto [label, probability] = judge(spec, answer, best[0]);

  if (options.format == "text") {
    std::cout << printable(path);
    if (label != guess) std::cout << "  " << label;
    for (const size_t k : best) {
      const double share = rounded(answer.probabilities[k]);
      std::cout << "  " << printable(spec.classes[k]) << " " << percent(share, 2);
    }
    if (known) std::cout << "  known " << percent(*known, 1);
    std::cout << "\n";
    return;
  }

  std::cout << "{\"path\": " << quoted(path) << ", \"label\": " << quoted(label)
            << ", \"probability\": " << json(probability)
            << ", \"known\": " << (known ? json(*known) : json()) << ", \"top\": [";
  for (const size_t k : best) {
    if (k != best[0]) std::cout << ", ";
    std::cout << "{\"label\": " << quoted(spec.classes[k])
              << ", \"probability\": " << json(rounded(answer.probabilities[k])) << "}";
  }
  std::cout << "]}\n";
}

// Predicts one image, or reports why it cannot be used; -> whether it could.
bool predict_file(const string& path, Model& model, const Options& options) {
  Answer answer;
  try {
    const Spec& spec = model.spec;
    const string file = read_file(path);
    Image image = decode(file, spec.channels, spec.white, spec.ground, options.max_pixels);
    model.transparent += image.is_transparent;
    answer = predict(model, image);
    check_shares(answer);
  } catch (const Problem& problem) {
    return report_error(path, problem.what(), options);
  } catch (const std::bad_alloc&) {
    return report_error(path, "is too large for this machine's memory", options);
  }

  write(path, answer, model.spec, options);
  return true;
}

// Predicts what a PATH stands for; -> whether all of it could be used. Files in directories that
// are not images are added to `others`.
bool predict_path(const string& given, Model& model, const Options& options,
                  std::vector<string>& others) {
  std::vector<string> found;
  try {
    found = find_images(given, others);
  } catch (const Problem& problem) {
    return report_error(given, problem.what(), options);
  }

  bool complete = true;
  for (const string& path : found) {
    complete = predict_file(path, model, options) && complete;
    // Do not compute results that cannot be written.
    if (!std::cout) throw Problem("cannot write to standard output");
  }
  return complete;
}

// Notes how many images had transparent pixels, and what became of these.
void note_transparent(const Model& model) {
  if (model.transparent == 0) return;

  const std::optional<int> ground = model.spec.ground;
  string ending = "which the model file drops, as its training did";
  if (ground)
    ending = string("laid on ") + (*ground ? "white" : "black") + ", as the model's images were";
  const string images = model.transparent == 1 ? " image" : " images";
  say("note: " + grouped(model.transparent) + images + " with transparency, " + ending);
}

// Notes how many files were not taken for images, and the first names.
void note_skipped(const std::vector<string>& others) {
  if (others.empty()) return;

  const size_t named = std::min<size_t>(others.size(), 3);
  string names = others[0];
  for (size_t k = 1; k < named; k++) names += ", " + others[k];
  if (named < others.size()) names += ", ...";
  const bool is_one = others.size() == 1;
  const string kind = is_one ? " file that is no image: " : " files that are no images: ";
  say("note: skipped " + grouped(others.size()) + kind + names);
}

// --------------------------------------------------------------------------------- command line

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

// The value of an option that is a whole number from 1 to `highest`. Throws Problem.
int64_t whole(const string& option, const string& text, int64_t highest) {
  const bool is_digits = !text.empty() && text.find_first_not_of("0123456789") == string::npos;
  const int64_t number = is_digits && text.size() <= 12 ? std::stoll(text) : 0;
  if (number < 1 || number > highest)
    throw Problem("argument " + option + ": '" + text + "' is not a whole number from 1 to " +
                  std::to_string(highest) + HELP, 2);
  return number;
}

int count_of(const string& option, const string& text) { return int(whole(option, text, 999999)); }

// The value of an option that is a share of 1. Throws Problem.
double fraction(const string& option, const string& text) {
  // strtod alone also takes spaces, hexadecimals and inf.
  const bool is_number = !text.empty() && text.find_first_not_of("0123456789.eE+-") == string::npos;
  const char* const end = text.c_str() + text.size();
  char* stop = nullptr;
  const double value = std::strtod(text.c_str(), &stop);
  if (!is_number || stop != end || value < 0 || value > 1)
    throw Problem("argument " + option + ": '" + text + "' is not a number from 0 to 1" + HELP, 2);
  return value;
}

// Options by name: each is given the value that follows it. Throw Problem.
using Setter = void (*)(Options& options, const string& option, const string& value);
const std::map<string, Setter> SETTERS = {
    {"--model", [](auto& options, auto&, auto& value) { options.model = value; }},
    {"--format", [](auto& options, auto&, auto& value) { options.format = value; }},
    {"--threads",
     [](auto& options, auto& option, auto& value) { options.threads = count_of(option, value); }},
    {"--top-k",
     [](auto& options, auto& option, auto& value) { options.top_k = count_of(option, value); }},
    {"--max-pixels",
     [](auto& options, auto& option, auto& value) {
       options.max_pixels = whole(option, value, MAX_SIDE * MAX_SIDE);
     }},
    {"--reject",
     [](auto& options, auto& option, auto& value) { options.reject = fraction(option, value); }},
    {"--min-probability",
     [](auto& options, auto& option, auto& value) {
       options.min_probability = fraction(option, value);
     }},
};

Options parse(const std::vector<string>& arguments) {
  Options options;
  bool only_paths = false;
  for (size_t k = 0; k < arguments.size(); k++) {
    const string& argument = arguments[k];
    const string option = argument.substr(0, argument.find('='));
    const auto setter = SETTERS.find(option);

    if (only_paths || argument.size() < 2 || argument[0] != '-') {
      options.paths.push_back(argument);
    } else if (argument == "--") {
      only_paths = true;
    } else if (argument == "--self-test") {
      options.self_test = true;
    } else if (argument == "--help" || argument == "-h") {
      options.help = true;
    } else if (setter == SETTERS.end()) {
      throw Problem("unrecognized arguments: " + argument + HELP, 2);
    } else if (option.size() < argument.size()) {
      setter->second(options, option, argument.substr(option.size() + 1));
    } else if (k + 1 < arguments.size()) {
      setter->second(options, option, arguments[++k]);
    } else {
      throw Problem("argument " + option + ": expected one argument" + HELP, 2);
    }
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
  if (options.reject && !model.spec.has_known)
    throw Problem(model.path + " does not say how familiar an image looks: --reject cannot be used",
                  2);
  if (options.reject) model.spec.reject = options.reject;
  if (options.min_probability) model.spec.min_probability = options.min_probability;

  bool complete = true;
  std::vector<string> others;
  for (const string& given : options.paths)
    complete = predict_path(given, model, options, others) && complete;
  note_transparent(model);
  note_skipped(others);
  return complete ? 0 : 1;
}

int main(int count, char** values) {
  int code = 1;
  try {
    code = run({values + 1, values + count});
    if (!std::cout.flush()) throw Problem("cannot write to standard output");
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
