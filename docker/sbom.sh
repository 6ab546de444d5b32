#!/bin/sh
# The software bill of materials of the binary, as CycloneDX 1.5 in JSON: every crate that is linked
# into it, with its licence, the checksum in Cargo.lock and its dependencies. Not the base image's
# packages, nor NVIDIA's libraries.
#
#     docker/sbom.sh [options of cargo tree, such as --features cuda] > sbom.cdx.json
set -eu
cd "$(dirname "$0")/.."

cargo tree --locked --package sd-server --edges normal,no-proc-macro --prefix depth --format '|{p}|{l}' "$@" |
    awk -F '|' '
# Cargo.lock: one block for each package.
FILENAME == "Cargo.lock" {
    split($0, field, "\"")
    if (/^name = /) name = field[2]
    if (/^version = /) version = field[2]
    if (/^checksum = /) checksum[name " " version] = field[2]
    next
}
# depth|name vVERSION (where)|licence
{
    split($2, word, " ")
    name = word[1]
    version = substr(word[2], 2)
    ref = "pkg:cargo/" name "@" version
    gsub(/\+/, "%2B", ref)
    at[$1] = ref
    if ($1 > 0 && !((at[$1 - 1], ref) in known)) {
        known[at[$1 - 1], ref] = 1
        needs[at[$1 - 1]] = needs[at[$1 - 1]] (needs[at[$1 - 1]] ? ", " : "") "\"" ref "\""
    }
    if (ref in seen) next
    seen[ref] = 1
    order[++count] = ref
    sub(/ \(\*\)$/, "", $3)
    gsub(/\//, " OR ", $3)
    gsub(/  OR  /, " OR ", $3)
    sum = checksum[name " " version]
    line[ref] = "{\"type\": \"" ($1 > 0 ? "library" : "application") "\", \"bom-ref\": \"" ref \
        "\", \"name\": \"" name "\", \"version\": \"" version "\", \"purl\": \"" ref "\"" \
        ($3 ? ", \"licenses\": [{\"expression\": \"" $3 "\"}]" : "") \
        (sum ? ", \"hashes\": [{\"alg\": \"SHA-256\", \"content\": \"" sum "\"}]" : "") "}"
}
END {
    if (!count) exit 1
    print "{\"$schema\": \"http://cyclonedx.org/schema/bom-1.5.schema.json\","
    print "\"bomFormat\": \"CycloneDX\", \"specVersion\": \"1.5\", \"version\": 1,"
    print "\"metadata\": {\"component\": " line[order[1]] "},"
    print "\"components\": ["
    for (i = 2; i <= count; i++) print line[order[i]] (i < count ? "," : "")
    print "],\n\"dependencies\": ["
    for (i = 1; i <= count; i++)
        print "{\"ref\": \"" order[i] "\", \"dependsOn\": [" needs[order[i]] "]}" (i < count ? "," : "")
    print "]}"
}' Cargo.lock -
