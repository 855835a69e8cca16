// Finds and decodes image files, as step3_infer.py does. Include it once: it defines stb_image's functions.

#include <glob.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#define STB_IMAGE_IMPLEMENTATION
#define STB_IMAGE_STATIC
#define STBI_ONLY_PNG
#define STBI_ONLY_JPEG
#define STBI_ONLY_BMP
#define STBI_ONLY_GIF
#include <stb_image.h>

namespace fs = std::filesystem;
using std::string;

constexpr int64_t MAX_PIXELS = 2 * 89478485;  // Pillow's limit

// As in step3_infer.py: a file of a kind that stb_image cannot read is an error, it is not skipped.
inline const string IMAGE_SUFFIXES = ".png .jpg .jpeg .webp .bmp .gif .tif .tiff .pgm .ppm .pbm .avif .jp2";

// A failure that the user can correct: it is printed as one `error:` line.
struct Problem : std::runtime_error {
  int code;
  explicit Problem(const string& message, int code = 1) : std::runtime_error(message), code(code) {}
};

struct Image {
  int height, width;
  std::vector<uint8_t> pixels;  // [height, width, channels]
};

// What stb_image reads from. It reads zeros beyond the end, so `ended` records whether it read that far.
struct Source {
  const string& bytes;
  size_t at = 0;
  bool ended = false;
};

inline const stbi_io_callbacks READER = {
    [](void* user, char* data, int size) {
      auto& source = *static_cast<Source*>(user);
      const size_t count = source.bytes.copy(data, size, source.at);
      source.ended = source.ended || count == 0;
      source.at += count;
      return int(count);
    },
    [](void* user, int count) {
      auto& source = *static_cast<Source*>(user);
      source.at = std::min(source.at + count, source.bytes.size());
    },
    [](void* user) {
      const auto& source = *static_cast<Source*>(user);
      return int(source.at == source.bytes.size());
    }};

// The EXIF orientation of a JPEG or PNG, from 1 (upright) to 8.
inline int exif_orientation(const string& bytes) {
  const auto number = [&](size_t i, int count, bool little = false) {  // beyond the end there are zeros
    size_t value = 0;
    for (int k = 0; k < count; k++) {
      const size_t at = little ? i + count - 1 - k : i + k;
      value = value << 8 | (at < bytes.size() ? uint8_t(bytes[at]) : 0);
    }
    return value;
  };
  size_t tiff = 0;  // where the EXIF block starts
  if (number(0, 2) == 0xFFD8) {  // JPEG: marker, length, content; the pixels start at marker FFDA
    for (size_t i = 2; !tiff && number(i, 1) == 0xFF && number(i, 2) != 0xFFDA; i += 2 + number(i + 2, 2))
      if (number(i, 2) == 0xFFE1 && number(i + 4, 6) == 0x457869660000) tiff = i + 10;  // "Exif"
  } else if (number(0, 4) == 0x89504E47) {  // PNG: length, name, content, checksum
    for (size_t i = 8; !tiff && i < bytes.size(); i += 12 + number(i, 4))
      if (number(i + 4, 4) == 0x65584966) tiff = i + 8;  // "eXIf"
  }
  const bool little = number(tiff, 1) == 'I';
  const size_t directory = tiff + number(tiff + 4, 4, little);
  for (size_t k = 0; tiff && k < number(directory, 2, little); k++) {
    const size_t entry = directory + 2 + 12 * k, value = number(entry + 8, 2, little);
    if (number(entry, 2, little) == 0x0112) return value >= 1 && value <= 8 ? int(value) : 1;
  }
  return 1;
}

// Pixels of `components` bytes (grey, grey + alpha, RGB, RGB + alpha) -> upright Image of 1 or 3 channels;
// orientation: that of EXIF.
inline Image upright(const uint8_t* pixels, int height, int width, int components, int channels,
                     int orientation) {
  const bool swap = orientation >= 5;
  const bool from_below = orientation == 3 || orientation == 4 || orientation == 6 || orientation == 7;
  const bool from_right = orientation == 2 || orientation == 3 || orientation == 7 || orientation == 8;
  Image image{swap ? width : height, swap ? height : width, {}};
  image.pixels.resize(size_t(height) * width * channels);
  uint8_t* out = image.pixels.data();
  const int step = components < 3 ? 0 : 1;  // red, green and blue of a grey pixel are the same byte
  for (int y = 0; y < image.height; y++)
    for (int x = 0; x < image.width; x++, out += channels) {
      const size_t row = from_below ? height - 1 - (swap ? x : y) : swap ? x : y;
      const size_t column = from_right ? width - 1 - (swap ? y : x) : swap ? y : x;
      const uint8_t* p = pixels + (row * width + column) * components;
      if (channels == 3)
        for (int k = 0; k < 3; k++) out[k] = p[k * step];
      else  // ITU-R 601-2 luma in Pillow's fixed point
        *out = (19595 * p[0] + 38470 * p[step] + 7471 * p[2 * step] + 0x8000) >> 16;
    }
  return image;
}

// The bytes of an image file -> Image; channels is 1 (grey) or 3 (RGB), alpha is dropped. white: the level of
// 16-bit greys that becomes 255.
// Throws Problem with the reason (the caller knows the name).
inline Image decode(const string& bytes, int channels, uint32_t white) {
  if (bytes.empty()) throw Problem("is empty");
  int width, height, components;
  Source header{bytes}, depth{bytes}, source{bytes};
  if (!stbi_info_from_callbacks(&READER, &header, &width, &height, &components) || width < 1 || height < 1)
    throw Problem("is damaged, too large or not a PNG, JPEG, BMP or GIF image that stb_image can read");
  if (int64_t(width) * height > MAX_PIXELS)
    throw Problem("refused as a decompression bomb: " + std::to_string(int64_t(width) * height) + " pixels");
  // As with Pillow and step3: 16-bit greys are scaled, and 16-bit colours are reduced to their high byte.
  const bool scale = stbi_is_16_bit_from_callbacks(&READER, &depth) && components == 1;
  void* loaded = nullptr;
  if (scale)
    loaded = stbi_load_16_from_callbacks(&READER, &source, &width, &height, &components, 1);
  else
    loaded = stbi_load_from_callbacks(&READER, &source, &width, &height, &components, 0);
  const std::unique_ptr<void, decltype(&stbi_image_free)> data(loaded, stbi_image_free);
  if (!data) throw Problem(string("is corrupt or truncated: ") + stbi_failure_reason());
  if (source.ended) throw Problem("is truncated");
  auto* pixels = static_cast<uint8_t*>(data.get());
  if (scale) {
    const auto* wide = static_cast<const uint16_t*>(data.get());
    for (size_t k = 0; k < size_t(width) * height; k++)
      pixels[k] = (std::min<uint32_t>(wide[k], white) * 255 + white / 2) / white;
    components = 1;
  }
  return upright(pixels, height, width, components, channels, exif_orientation(bytes));
}

inline string read_file(const string& path) {
  std::error_code error;
  if (!fs::exists(path, error)) throw Problem(error ? "cannot be read: " + error.message() : "no such file");
  if (fs::is_directory(path, error)) throw Problem("is a directory that cannot be read");
  if (!fs::is_regular_file(path, error)) throw Problem("is not a regular file");
  const uintmax_t size = fs::file_size(path, error);
  if (size > INT32_MAX) throw Problem("is larger than 2 GB");
  std::ifstream file(path, std::ios::binary);
  string bytes(file ? size : 0, '\0');
  if (!file.read(bytes.data(), bytes.size()))
    throw Problem(string("cannot be read: ") + std::strerror(errno));
  return bytes;
}

// Adds the images below a directory in name order, its own before those of its subdirectories. A directory
// that cannot be read is added itself, so that read_file reports it.
inline void walk(const fs::path& directory, std::vector<string>& found) {
  std::vector<fs::path> files, subdirectories;
  std::error_code error;
  for (fs::directory_iterator entry(directory, error), end; entry != end; entry.increment(error)) {
    string suffix = entry->path().extension().string() + " ";
    for (char& c : suffix) c = std::tolower(static_cast<unsigned char>(c));
    const bool image = suffix[0] == '.' && (IMAGE_SUFFIXES + " ").find(suffix) != string::npos;
    std::error_code ignored;  // for example of a dangling link
    if (!entry->is_directory(ignored)) {
      if (image) files.push_back(entry->path());
    } else if (!entry->is_symlink(ignored)) {  // a link may lead back up
      subdirectories.push_back(entry->path());
    }
  }
  if (error) found.push_back(directory.string());
  std::sort(files.begin(), files.end());
  std::sort(subdirectories.begin(), subdirectories.end());
  for (const auto& file : files) found.push_back(file.string());
  for (const auto& subdirectory : subdirectories) walk(subdirectory, found);
}

// The images that `path` stands for: a file as given, those below a directory, or what a glob matches.
inline std::vector<string> find_images(const string& path) {
  std::vector<string> found, directories;
  std::error_code error;
  if (!fs::exists(fs::symlink_status(path, error)) && path.find_first_of("*?[") != string::npos) {
    glob_t matches{};
    glob(path.c_str(), 0, nullptr, &matches);
    for (size_t k = 0; k < matches.gl_pathc; k++) {
      const string match = matches.gl_pathv[k];
      (fs::is_directory(match, error) ? directories : found).push_back(match);
    }
    globfree(&matches);
    if (found.empty() && directories.empty()) throw Problem("matches no file");
    if (!found.empty()) return found;
  } else if (fs::is_directory(path, error)) {
    directories.push_back(path);
  } else {
    return {path};
  }
  for (const auto& directory : directories) walk(directory, found);
  if (found.empty()) throw Problem("no images in this directory (looked for " + IMAGE_SUFFIXES + ")");
  return found;
}
