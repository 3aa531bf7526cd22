// A file of the site, checked before anything uses it.

const hex = (buffer) => Array.from(new Uint8Array(buffer), (byte) => byte.toString(16).padStart(2, "0")).join("");

/**
 * The bytes of {path, bytes, sha256}; `progress` is told how many more have come.
 * Browsers compute checksums on https and on localhost only; elsewhere the number of bytes has to do.
 */
export async function download({ path, bytes, sha256 }, progress = () => {}) {
  let response;
  try {
    response = await fetch(path, { cache: "no-cache" }); // a site built anew has other files under the same names
  } catch {
    throw new Error(`${path} could not be loaded; is the server still running?`);
  }
  if (!response.ok) throw new Error(`${path} could not be loaded (the server says ${response.status}).`);
  const content = new Uint8Array(bytes);
  const changed = new Error(`${path} is not the file that this page was built with; copy the whole site again.`);
  let at = 0;
  for (const reader = response.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) break;
    if (at + value.length > bytes) throw changed;
    content.set(value, at);
    at += value.length;
    progress(value.length);
  }
  if (at !== bytes) throw changed;
  if (crypto.subtle && hex(await crypto.subtle.digest("SHA-256", content)) !== sha256) throw changed;
  return content;
}
