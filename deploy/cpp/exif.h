// Reads the EXIF orientation of an image file by its tag alone, as step3_infer.py does.

#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

#include "formats.h"

using std::string;

constexpr int UPRIGHT = 1;  // of EXIF's orientations, 1 to 8
constexpr size_t ORIENTATION = 0x0112;
const string EXIF_HEADER("Exif\0\0", 6);
const string XMP_HEADER("http://ns.adobe.com/xap/1.0/\0", 29);
const string XMP_KEYWORD("XML:com.adobe.xmp\0\0", 19);  // and that the text is not compressed

// Reads whole numbers of an image file; beyond its end there are zeros.
struct Numbers {
  const string& bytes;

  // `count` bytes at i, the highest first, or the lowest first.
  size_t operator()(size_t i, int count, bool lowest_first = false) const {
    size_t value = 0;
    for (int k = 0; k < count; k++) {
      const size_t at = lowest_first ? i + count - 1 - k : i + k;
      const uint8_t byte = at < bytes.size() ? bytes[at] : 0;
      value = value << 8 | byte;
    }
    return value;
  }
};

// The metadata of a JPEG that starts with this header, of which large ones are split over several
// segments; "" if it has none.
inline string metadata_of_jpeg(const string& bytes, const string& header) {
  const Numbers number{bytes};
  string metadata;

  size_t i = 2;  // marker, length, content; the pixels start at marker FFDA
  while (i < bytes.size() && number(i, 1) == 0xFF && number(i, 2) != 0xFFDA) {
    if (number(i, 2) == 0xFFFF) {  // bytes between segments
      i++;
      continue;
    }

    const size_t end = i + 2 + number(i + 2, 2);
    const size_t start = i + 4 + header.size();
    const bool is_wanted = number(i, 2) == 0xFFE1 && starts_with(bytes, header, i + 4);
    if (is_wanted && start <= end) metadata += bytes.substr(start, end - start);
    i = end;
  }
  return metadata;
}

// The content of a PNG's last chunk of a type that starts with this header; "" if it has none.
inline string metadata_of_png(const string& bytes, const string& type, const string& header) {
  const Numbers number{bytes};
  string metadata;

  size_t i = 8;  // length, type, content, checksum
  while (i < bytes.size() && !starts_with(bytes, "IEND", i + 4)) {
    const size_t length = number(i, 4);
    const size_t start = i + 8 + header.size();
    const size_t end = i + 8 + length;
    const bool is_wanted = starts_with(bytes, type + header, i + 4);
    if (is_wanted && start <= end) metadata = bytes.substr(start, end - start);
    i += 12 + length;
  }
  return metadata;
}

// How many bytes a whole number of an EXIF type has, with a sign or without; 0 for other types.
inline int size_of_type(size_t type) {
  if (type == 1 || type == 6) return 1;
  if (type == 3 || type == 8) return 2;
  if (type == 4 || type == 9) return 4;
  return 0;
}

// The orientation in EXIF, whatever it is, if there is one. Other tags may hold anything: some
// cameras and programs write types that no standard allows.
inline std::optional<size_t> orientation_in_exif(const string& exif) {
  size_t start = 0;
  while (starts_with(exif, EXIF_HEADER, start)) start += EXIF_HEADER.size();  // some write it twice

  const bool lowest_first = starts_with(exif, "II", start);
  if (!lowest_first && !starts_with(exif, "MM", start)) return {};

  const Numbers number{exif};
  const size_t directory = start + number(start + 4, 4, lowest_first);
  const size_t count = number(directory, 2, lowest_first);
  for (size_t k = 0; k < count; k++) {
    const size_t entry = directory + 2 + 12 * k;  // tag, type, count, value: 2, 2, 4 and 4 bytes
    const int size = size_of_type(number(entry + 2, 2, lowest_first));
    if (number(entry, 2, lowest_first) == ORIENTATION && size > 0)
      return number(entry + 8, size, lowest_first);
  }
  return {};
}

// The orientation in XMP, which is XML, if there is one.
inline std::optional<size_t> orientation_in_xmp(const string& xmp) {
  for (const string name : {"tiff:Orientation=\"", "tiff:Orientation>"}) {
    const size_t at = xmp.find(name);
    const size_t digit = at + name.size();
    if (at != string::npos && digit < xmp.size() && xmp[digit] >= '0' && xmp[digit] <= '9')
      return xmp[digit] - '0';
  }
  return {};
}

// The orientation of a JPEG or PNG by its EXIF, or else by its XMP, from 1 (upright) to 8; other
// formats have none.
inline int orientation_of(const string& bytes) {
  string exif;
  string xmp;
  if (starts_with(bytes, "\xFF\xD8")) {
    exif = metadata_of_jpeg(bytes, EXIF_HEADER);
    xmp = metadata_of_jpeg(bytes, XMP_HEADER);
  } else if (starts_with(bytes, "\x89PNG")) {
    exif = metadata_of_png(bytes, "eXIf", "");
    xmp = metadata_of_png(bytes, "iTXt", XMP_KEYWORD);
  }

  std::optional<size_t> orientation = orientation_in_exif(exif);
  if (!orientation) orientation = orientation_in_xmp(xmp);
  return orientation && *orientation >= 1 && *orientation <= 8 ? int(*orientation) : UPRIGHT;
}
