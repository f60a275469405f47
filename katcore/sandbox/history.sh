# Leaves in every git repository of a root file system HEAD, what leads up to it, its tags, and the working tree.
# Branches, remotes, stashes, reflogs, notes, hooks, linked worktrees, unreachable objects and stores of objects that
# are no repository go. What is staged goes too: the index becomes that of HEAD. Wants git and find.
set -eu
export HOME=/nonexistent GIT_NO_REPLACE_OBJECTS=1 GIT_NO_LAZY_FETCH=1
export GIT_CONFIG_COUNT=1 GIT_CONFIG_KEY_0=safe.directory 'GIT_CONFIG_VALUE_0=*'
found=$(mktemp -d)
: > "$found/repositories" > "$found/stores"
trap 'rm -rf "$found"' EXIT

repository() { git --git-dir="$1" "${@:2}"; }

# A clean repository beside the old one: what HEAD reaches in one pack, and its refs.
prepare() {
  local old=$1 new=$1.katcore head branch id name
  git init -q --bare --template= --object-format="$(repository "$old" rev-parse --show-object-format)" "$new"
  branch=$(repository "$old" symbolic-ref -q HEAD) || branch=
  head=$(repository "$old" rev-parse -q --verify HEAD) || head=
  [ -z "$branch" ] || repository "$new" symbolic-ref HEAD "$branch"
  [ -n "$head" ] || return 0
  repository "$old" for-each-ref --merged="$head" --format='%(objectname) %(refname)' refs/tags > "$found/tags"
  { echo "$head"; cut -d' ' -f1 "$found/tags"; } |
    repository "$old" pack-objects -q --revs "$new/objects/pack/pack" > "$found/pack"
  [ ! -s "$old/shallow" ] || repository "$old" rev-list "$head" | grep -Fxf "$old/shallow" > "$new/shallow" || :
  [ -s "$new/shallow" ] || rm -f "$new/shallow"
  while read -r id name; do repository "$new" update-ref "$name" "$id"; done < "$found/tags"
  repository "$new" update-ref ${branch:-"--no-deref" HEAD} "$head"
  repository "$new" rev-list --objects HEAD > "$found/reached"
}

# Puts it in the old one's place. Configuration stays, but for where other versions can be had.
swap() {
  local old=$1 new=$1.katcore key has_index=
  [ ! -f "$old/index" ] || has_index=yes
  find "$old" -mindepth 1 -maxdepth 1 ! -name config ! -name modules ! -name info ! -name description \
    -exec rm -rf {} +
  find "$old/info" -mindepth 1 ! -name exclude ! -name attributes ! -name sparse-checkout -delete 2>/dev/null || :
  git config --file "$old/config" --name-only --list > "$found/keys"
  while IFS= read -r key; do
    case $key in
      remote.*|branch.*|include.*|includeif.*|url.*|extensions.partialclone|extensions.refstorage|\
      extensions.worktreeconfig) git config --file "$old/config" --unset-all "$key" || : ;;
    esac
  done < "$found/keys"
  rm -f "$new/config"
  mv "$new"/* "$old/"
  rmdir "$new"
  if [ -n "$has_index" ] && repository "$old" rev-parse -q --verify HEAD > "$found/head"; then
    repository "$old" read-tree HEAD
  fi
  chown -R "$(stat -c %u:%g "$old")" "$old"
}

# Cargo's own clones have no HEAD to go by.
find / -xdev \( -path /proc -o -path /sys -o -path /dev -o -path '*/.cargo/git' \) -prune \
  -o -type d -name objects -print > "$found/objects" 2>/dev/null || :
while IFS= read -r objects; do
  old=${objects%/objects}
  if [ -e "$old/HEAD" ] && [ -d "$old/refs" ]; then
    echo "$old" >> "$found/repositories"
  elif [ -d "$objects/pack" ] && [ -d "$objects/info" ]; then
    echo "$objects" >> "$found/stores"
  fi
done < "$found/objects"
while IFS= read -r old; do
  prepare "$old"
  [ ! -f "$old/objects/info/alternates" ] ||
    (cd "$old/objects" && grep -v '^#' info/alternates | xargs -r -d '\n' realpath -m) >> "$found/stores"
done < "$found/repositories"
while IFS= read -r old; do swap "$old"; done < "$found/repositories"
while IFS= read -r objects; do
  [ -e "${objects%/*}/HEAD" ] || rm -rf "$objects"
done < "$found/stores"
find / -xdev \( -path /proc -o -path /sys -o -path /dev \) -prune -o -type f -name .git \
  -exec grep -q '^gitdir: .*/worktrees/' {} \; -exec rm -f {} + 2>/dev/null || :
