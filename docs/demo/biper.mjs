// The module by the name that Node knows; a page takes biper.js, which every web server serves as JavaScript.
export { hasSimd, load } from "./biper.js";
